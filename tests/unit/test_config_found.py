"""JSONs as they are met: what DeepSpeed accepts is accepted, and what it has removed is called removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hjson
import pytest
from found_configs import ACCEPTED, REMOVED

from toolkit.config import load_config, validate
from toolkit.config.files import without_auto, without_comments
from toolkit.errors import UserError


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_config_that_deepspeed_reads_is_accepted(name: str, tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    path = tmp_path / "theirs.json"
    path.write_text(ACCEPTED[name])
    config = load_config(path)
    validate(config, origin="theirs.json")
    # "auto" is filled in by a trainer before DeepSpeed sees it.
    filled = without_auto(config)
    if "train_batch_size" not in filled:
        filled.setdefault("train_micro_batch_size_per_gpu", 1)
    # DeepSpeed's reader divides the batch by the ranks that share a sequence.
    filled.pop("sequence_parallel_size", None)
    DeepSpeedConfig(filled)


@pytest.mark.parametrize("name", REMOVED)
def test_what_deepspeed_has_removed_is_called_removed(name: str) -> None:
    text, sentence = REMOVED[name]
    with pytest.raises(UserError) as caught:
        validate(hjson.loads(text), origin="theirs.json")
    assert sentence in str(caught.value)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("kind", ["OneBitAdam", "onebitadam", "OneBitLamb", "ZeroOneAdam", "zerooneadam"])
def test_removed_optimizers_are_no_misspelling(kind: str) -> None:
    with pytest.raises(UserError, match=f"optimizer.type '{kind}' is no longer part of DeepSpeed"):
        validate({"train_batch_size": 1, "optimizer": {"type": kind}}, origin="theirs.json")


def test_every_key_that_deepspeed_says_it_removed_is_called_removed() -> None:
    from deepspeed.runtime import config as reader

    for key in reader._REMOVED_TOP_LEVEL_CONFIG_KEYS:
        with pytest.raises(UserError, match=f"theirs.json: {key} is no longer part of DeepSpeed"):
            validate({"train_batch_size": 1, key: {}}, origin="theirs.json")
    for key in reader._REMOVED_ZERO_CONFIG_KEYS:
        with pytest.raises(UserError, match=f"zero_optimization.{key} is no longer part of DeepSpeed"):
            validate({"train_batch_size": 1, "zero_optimization": {key: 1}}, origin="theirs.json")


def test_comments_are_left_out_at_every_depth() -> None:
    given: dict[str, Any] = {"_a": 1, "b": {"//": 2, "c": [{"_d": 3, "e": 4}], "__f": {}}, "// g": 5}
    assert without_comments(given) == load_config(given) == {"b": {"c": [{"e": 4}]}}
    assert "_a" in given


def test_comments_may_repeat_and_keys_may_not(tmp_path: Path) -> None:
    path = tmp_path / "commented.json"
    path.write_text('{"//": "one", "//": "two", "bf16": {"_": 1, "_": 2, "enabled": true}}')
    assert load_config(path) == {"bf16": {"enabled": True}}


def test_validate_passes_over_comments_in_a_dict_that_was_not_loaded() -> None:
    config = {"train_batch_size": 1, "//": "x", "zero_optimization": {"stage": 2, "_note": "y"}}
    validate(config, origin="theirs.json", world_size=1)
