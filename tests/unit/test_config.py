"""Configurations: the shipped files, loading and overriding, and the sentence for every mistake in those."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.config import apply_overrides, load_config, shipped_configs, validate
from toolkit.errors import UserError
from toolkit.masking import is_secret, masked, masks
from toolkit.optim import RULES, find_rule
from toolkit.optim.rule import all_states

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = shipped_configs()


# ---------------------------------------------------------------------------------------------- shipped files


def test_every_rule_has_a_file_for_every_stage() -> None:
    stages, offload = ["zero1", "zero2", "zero3"], ["zero2_offload", "zero3_offload"]
    optimizers = ["AdamW", *(name for name, made in RULES.items() if made.rule.__module__.startswith("toolkit."))]
    wanted = {f"{optimizer.lower()}_{stage}" for optimizer in optimizers for stage in stages}
    wanted |= {f"{optimizer}_{way}" for optimizer in ("adamw", "adamw8", "amcs", "soam") for way in offload}
    lean = ["zero2_lean", "zero3_lean", "zero3_offload_lean"]
    assert set(SHIPPED) == wanted | {f"{optimizer}_{way}" for optimizer in ("adamw8", "amcs") for way in lean}


@pytest.mark.parametrize("name", [name for name, config in SHIPPED.items() if find_rule(config.optimizer)])
def test_files_of_rules_differ_in_the_optimizer_only_and_say_its_defaults(name: str) -> None:
    config = load_config(name)
    optimizer = config.pop("optimizer")
    same = load_config(f"amcs_{SHIPPED[name].way.removesuffix('_lean')}")
    del same["optimizer"]
    assert config == same
    rule = RULES[optimizer["type"]].rule
    lean = name.endswith("_lean")
    assert optimizer["params"].pop("release_gradients", False) == lean
    for key, value in optimizer["params"].items():
        if key not in ("state_format", "weights"):
            default = rule.model_fields[key].get_default()
            assert value == (list(default) if isinstance(default, tuple) else default), key
    assert optimizer["params"]["weights"] == ("bf16" if lean else "bf16+8")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_is_what_its_name_says_and_valid_at_any_world_size(name: str) -> None:
    config = json.loads(SHIPPED[name].path.read_text())
    optimizer, stage, *more = name.split("_")
    assert config["optimizer"]["type"].lower() == optimizer
    assert f"zero{config['zero_optimization']['stage']}" == stage
    parts = [key for key in config["zero_optimization"] if key.startswith("offload_")]
    wanted = {"zero2": ["offload_optimizer"], "zero3": ["offload_optimizer", "offload_param"]}
    assert parts == (wanted[stage] if "offload" in more else [])
    params = config["optimizer"]["params"]
    assert (params.get("state_format") == "lean" and params["release_gradients"]) == ("lean" in more)
    for world_size in (None, 1, 2, 8):
        validate(config, origin=name, world_size=world_size)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_describes_itself(name: str) -> None:
    config = SHIPPED[name]
    assert config.optimizer.lower() == name.split("_")[0]
    rule = find_rule(config.optimizer)
    coded = rule is not None and any(state.of is None for state in all_states(rule.rule.variants({})))
    assert config.state_format == ("lean" if name.endswith("_lean") else "8bit" if coded else "fp32")
    assert bool(config.offload) == ("_offload" in name)
    assert name == f"{config.optimizer.lower()}_{config.way}"
    assert config.idea and config.placing and "\n" not in config.idea + config.placing


def test_ideas_and_places_tell_the_shipped_files_apart() -> None:
    assert len({(config.idea, config.placing) for config in SHIPPED.values()}) == len(SHIPPED)


def test_files_of_one_optimizer_differ_in_sharding_only() -> None:
    for optimizer in {config.optimizer.lower() for config in SHIPPED.values()}:
        rest = []
        for name in (f"{optimizer}_zero{stage}" for stage in (1, 2, 3)):
            config = load_config(name)
            del config["zero_optimization"]
            rest.append(config)
        assert rest[0] == rest[1] == rest[2]


def test_an_installed_package_finds_the_files_inside_itself(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "toolkit", tmp_path / "toolkit", ignore=ignore)
    shutil.copytree(REPOSITORY / "ds_configs", tmp_path / "toolkit" / "ds_configs")
    # Another package's folder beside ours must not be taken for it.
    (tmp_path / "ds_configs").mkdir()
    script = "import toolkit.config as c; print(c.shipped_configs()['amcs_zero2'].path)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == tmp_path / "toolkit" / "ds_configs" / "amcs_zero2.json"


# ---------------------------------------------------------------------------------------------------- loading


def test_a_config_is_loaded_by_name_by_path_and_from_a_dict(tmp_path: Path) -> None:
    by_name = load_config("amcs_zero2")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(by_name))
    assert load_config(path) == load_config(str(path)) == by_name
    copied = load_config(by_name)
    copied["optimizer"]["params"]["lr"] = 7
    assert by_name["optimizer"]["params"]["lr"] != 7


def test_hjson_as_deepspeed_reads_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "commented.json"
    path.write_text('{\n  // the micro-batch\n  "train_micro_batch_size_per_gpu": 3,\n  # trailing comma\n}\n')
    assert load_config(path) == {"train_micro_batch_size_per_gpu": 3}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{\n  "a": 1,\n  "b": [1, 2\n}', "is not valid JSON"),
        ('{"bf16": {"enabled": true}', "line 1, column"),
        ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
        (
            '{"zero_optimization": {"offload_param": {"device": "cpu", "device": "none"}}}',
            "the key 'zero_optimization.offload_param.device' appears twice",
        ),
        ('{"x": [{"a": 1, "a": 1}]}', "the key 'x.0.a' appears twice"),
        ("[1, 2]", "holds a list; a DeepSpeed config is one JSON object"),
        ("null", "holds null"),
        ('"amcs_zero2"', "holds text"),
        ("\n", "is empty"),
    ],
)
def test_a_broken_file_gets_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_syntax_error_is_placed_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{\n  "steps_per_print": 1,\n  "bf16": {"enabled" true}\n}')
    with pytest.raises(UserError, match="at line 3, column 2"):
        load_config(path)


def test_text_that_is_not_utf8_gets_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "latin.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="is not text in UTF-8 from byte 7 on; save it in that encoding"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("amcs_zer2", "config 'amcs_zer2' is neither a shipped config nor a file. Did you mean 'amcs_zero2'?"),
        ("configs/soam_zero3.jsn", "Did you mean 'soam_zero3'?"),
        ("qwertyuiop", "Shipped are <optimizer>_zero1, "),
        (".", "is a folder, not a file"),
    ],
)
def test_an_unknown_config_names_the_nearest(name: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(name)
    assert sentence in str(caught.value)


# -------------------------------------------------------------------------------------------------- overrides


def test_overrides_set_values_in_a_copy() -> None:
    config = load_config("amcs_zero2")
    before = copy.deepcopy(config)
    result = apply_overrides(
        config,
        [
            "zero_optimization.stage=3",
            "optimizer.params.betas=[0.8, 0.9, 0.99]",
            "optimizer.params.alpha=cosine",
            "csv_monitor.enabled=true",
            "csv_monitor.job_name=a=b",
            "zero_optimization.stage=1",
        ],
    )
    assert config == before
    assert result["zero_optimization"]["stage"] == 1
    assert result["optimizer"]["params"]["betas"] == [0.8, 0.9, 0.99]
    assert result["optimizer"]["params"]["alpha"] == "cosine"
    assert result["csv_monitor"] == {"enabled": True, "job_name": "a=b"}
    validate(result, origin="overridden")


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("zero_optimization.stage", "cannot read the assignment 'zero_optimization.stage'"),
        ("=3", "cannot read the assignment"),
        ("zero_optimization..stage=3", "cannot read the assignment"),
        ("steps_per_print.x=1", "'steps_per_print' is 2147483647, which holds no keys"),
    ],
)
def test_an_override_that_cannot_be_applied_gets_one_sentence(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(load_config("amcs_zero2"), [assignment])
    assert sentence in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
key_names = st.text(st.characters(exclude_characters=".=", exclude_categories=("Cs", "Z", "C")), min_size=1)


@given(st.lists(key_names, min_size=1, max_size=4), json_values)
def test_any_json_value_can_be_set_at_any_depth(keys: list[str], value: Any) -> None:
    node = apply_overrides({}, [f"{'.'.join(keys)}={json.dumps(value)}"])
    for key in keys:
        assert list(node) == [key]
        node = node[key]
    assert node == value


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "whole number of more than 4300 digits"),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        ('"\\udfff"', "half of a surrogate pair"),
    ],
)
def test_what_json_can_spell_and_nothing_can_hold_gets_one_sentence(tmp_path: Path, value: str, sentence: str) -> None:
    file = tmp_path / "c.json"
    for text in (f'{{"train_batch_size": {value}}}', f'{{"train_batch_size": {value}, // read as Hjson\n}}'):
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            load_config(file)
    with pytest.raises(UserError, match=sentence):
        apply_overrides({}, [f"train_batch_size={value}"])


def test_secrets_by_their_common_names_are_known_and_settings_are_not_taken_for_them() -> None:
    for key in ("hf_tokens", "access_tokens", "token_2", "token2", "token_value", "signing_key", "ssh_key", "cookie"):
        assert is_secret(key), key
    for key in ("max_tokens", "tokenizer", "tokens", "num_tokens_2", "key", "kv_cache", "token_type_ids", "author"):
        assert not is_secret(key), key


def test_the_password_of_an_address_is_masked_under_any_name() -> None:
    config = {"url": "http://ann:s3cret@host:80/a@b", "n": 1}
    assert masked(config)["url"] == "http://ann:***@host:80/a@b"
    assert "s3cret" not in str(masked(["--set", "mlflow.uri=https://ann:s3cret@host"]))
    assert list(masks({"a": {"url": "https://ann:***@host"}, "b": "https://host/a:b"})) == ["a.url"]
    plain = ["https://host:8080/path", "git@host:repo", "s3://bucket/a:b@c"]
    assert masked(plain) == plain
