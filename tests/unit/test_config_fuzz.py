"""Mutated JSONs: one sentence or none, never a traceback; and stricter than DeepSpeed's reader only with a reason."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from mutations import mutants

from toolkit.config import validate
from toolkit.config.files import without_auto, without_comments
from toolkit.errors import UserError

# What is refused though DeepSpeed's reader takes it, and what would come of it. `docs/configs.md` says the same.
REASONS = {
    "unknown key": "a key that nobody reads: what it was meant to set is lost",
    "is no longer part of DeepSpeed": "a key or an optimizer that is gone, and what it did",
    "unknown hyper-parameter": "the optimizer's constructor would refuse it",
    r"optimizer\.(type|params)": "no such optimizer, or values with which it cannot make a step",
    r"scheduler\.(type|params)": "no such scheduler, or values with which it sets no rates",
    "must be a valid boolean": 'text that is true whatever it says ("false")',
    "must be a (number|finite number|valid number|valid integer)": "computed with at the first step or the next print",
    "must be a valid (string|list)": "used as a text or a list later",
    "must be an object": "read for its keys later",
    "must be (less|greater) than": "no number of sequences, or a norm to clip to that is none",
    "must be '": "no such type, method or word; found out when it is used",
    "must be one of debug": "no such level; the engine's constructor stops",
    "other than 0": "division by zero at the first step",
    "is not( a multiple of)? ": "batch sizes that do not multiply at this number of ranks",
    "DeepSpeed does not have it at": "an assertion in the engine's constructor",
    "has not tested with ZeRO": "an assertion in the engine's constructor",
    r"needs zero_optimization\.|needs fp16|needs nvme_path|needs the norm": "an assertion in the engine's constructor",
    r"^my\.json: zero_optimization\.\S+ needs ": "an assertion in the engine's constructor",
    "must be even": "an assertion in the engine's constructor",
    "run computes in": "the engine's constructor stops, or gradients of another type",
    "both true": "the engine's constructor stops",
    r"orders parameters by|whole blocks|at stage 3\.|not supported at stage 3": "shards that are no whole blocks",
    "only DeepSpeed's Adam": "an assertion in the engine's constructor",
    "takes the bits below": "weights that lose the bits which an optimizer state holds",
    "cannot be imported": "an import in the engine's constructor",
    "compiles DeepSpeed's own": "gradients that reach no optimizer",
    "which cannot run": "another optimizer than the one that is named",
    "overlap_comm at stages 2 and 3 only|does not allow": "an assertion in the engine's constructor",
    "frees each gradient|updates weights on the device": "weights updated by a part of their gradient",
    "the model is in|no longer supports": "tensors of two types, or a step that the optimizer refuses",
    "needs parameter groups for experts": "an assertion in the engine's constructor",
    "scales the loss in a way": "gradients that stay scaled",
}


def compared(count: int, seed: int) -> Iterator[tuple[dict[str, Any], str | None, str | None]]:
    """Each mutant, the sentence that refuses it here, and what DeepSpeed's reader says against it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    for config in mutants(count, seed):
        before = copy.deepcopy(config)
        ours = theirs = None
        try:
            validate(config, origin="my.json")
        except UserError as error:
            ours = str(error)
        assert repr(config) == repr(before)
        read = without_auto(without_comments(copy.deepcopy(config)))
        if read.get("train_batch_size") is None and read.get("train_micro_batch_size_per_gpu") is None:
            read["train_micro_batch_size_per_gpu"] = 1
        try:
            DeepSpeedConfig(read)
        except Exception as error:
            theirs = f"{type(error).__name__}: {error}"
        yield config, ours, theirs


def check(count: int, seed: int) -> Counter[str]:
    logger = logging.getLogger("DeepSpeed")
    before, logger.disabled = logger.disabled, True
    seen: Counter[str] = Counter()
    try:
        for config, ours, theirs in compared(count, seed):
            seen[f"we {'refuse' if ours else 'accept'}, they {'refuse' if theirs else 'accept'}"] += 1
            if ours is not None:
                assert ours.startswith("my.json: ") and "\n" not in ours, ours
            if ours is not None and theirs is None:
                assert any(re.search(reason, ours) for reason in REASONS), f"{ours}\n{json.dumps(config)}"
    finally:
        logger.disabled = before
    return seen


def test_a_mutated_config_is_refused_in_a_sentence_with_a_reason_or_accepted() -> None:
    seen = check(100, seed=0)
    assert seen["we accept, they accept"] > 10 and seen["we refuse, they accept"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_two_thousand_mutated_configs(seed: int) -> None:
    check(500, seed)
