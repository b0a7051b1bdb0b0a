"""What a checkpoint keeps to describe its model says the same when it is read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toolkit.checkpoint.model_files import config_hash, model_files, tokenizer_hash
from toolkit.data import load_tokenizer
from toolkit.models import load_config


@pytest.mark.parametrize(("model", "tokenizer"), [("qwen3-tiny", "python-4k"), ("qwen3-134m", "mistral-32k")])
def test_files_are_those_of_the_model_and_the_tokenizer(tmp_path: Path, model: str, tokenizer: str) -> None:
    config, loaded = load_config(model)[0], load_tokenizer(tokenizer)
    if tokenizer == "python-4k":
        loaded.chat_template = "{{ messages }}"
    folder = tmp_path / "kept"
    folder.mkdir()
    for name, content in model_files(config, loaded, tmp_path).items():
        (folder / name).write_bytes(content)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} == {path.name for path in folder.iterdir()}
    assert config_hash(load_config(str(folder))[0]) == config_hash(config)
    again = load_tokenizer(str(folder))
    assert tokenizer_hash(again) == tokenizer_hash(loaded)
    assert (again.eos_token_id, again.chat_template) == (loaded.eos_token_id, loaded.chat_template)


def test_generation_settings_are_those_beside_the_configuration(tmp_path: Path) -> None:
    settings = json.dumps({"temperature": 0.25}).encode()
    (tmp_path / "generation_config.json").write_bytes(settings)
    config, loaded = load_config("qwen3-tiny")[0], load_tokenizer("python-4k")
    for named in (tmp_path, tmp_path / "config.json"):
        assert model_files(config, loaded, named)["generation_config.json"] == settings
