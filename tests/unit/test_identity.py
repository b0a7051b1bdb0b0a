"""What a checkpoint must share with the run that resumes from it, and with whoever evaluates it."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import qwen3
from test_chat import packed, said, tokenizer, written

from toolkit import console
from toolkit.checkpoint import base as bases
from toolkit.checkpoint.base import Base, weights_hash
from toolkit.data import PackedConversations, PackedTokens, open_documents
from toolkit.errors import UserError
from toolkit.inference.evaluate import own_text
from toolkit.inference.opened import Opened
from toolkit.models import build_model, load_config
from toolkit.run.identity import check_same, identity
from toolkit.run.settings import RunSettings
from toolkit.run.texts import digest, open_text

WHERE = Path("runs/one/checkpoints/global_step4")


def here(text: PackedTokens) -> dict[str, dict[str, Any]]:
    return identity(RunSettings(model="qwen3-tiny"), load_config("qwen3-tiny")[0], "a tokenizer", text)


@pytest.mark.parametrize("noted", [None, 1, 3])
def test_conversations_of_another_packing_are_not_resumed(tmp_path: Path, noted: int | None) -> None:
    """What was saved before packing had a version is of the same data, and of other sequences."""
    text = packed(written(tmp_path, [{"messages": said("q", "a")}]), 40)
    now = here(text)
    check_same(json.loads(json.dumps(now)), now, WHERE)
    saved = copy.deepcopy(now)
    saved["data"].pop("packing")
    saved["data"] |= {} if noted is None else {"packing": noted}
    with pytest.raises(UserError) as caught:
        check_same(saved, now, WHERE)
    told = str(caught.value)
    assert told.startswith(f"the checkpoint {WHERE} was trained on conversations that another version of this package")
    assert f"(packing {noted or 'older than 2'}, this one's is {PackedConversations.packing})" in told
    assert "\n" not in told and "toolkit export" in told


def test_runs_of_plain_text_are_resumed_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain text " * 9)
    text = PackedTokens(open_documents(str(tmp_path / "a.txt")), tokenizer(), 8, seed=0)
    now = here(text)
    assert "packing" not in now["data"]
    check_same(json.loads(json.dumps(now)), now, WHERE)


def test_the_version_of_packing_is_that_of_the_sequences(tmp_path: Path) -> None:
    """Where this fails, sequences have changed: raise `PackedConversations.packing`, and pin what they are now."""
    rng = np.random.default_rng(0)
    rows = [{"messages": said("q", "a" * int(size))} for size in rng.integers(1, 90, 300)]
    stream = packed(written(tmp_path, rows), 63, shuffle_window=16, sequence_window=8)
    found = hashlib.sha256()
    for block in islice(stream.sequences(), 700):  # of several epochs
        found.update(np.ascontiguousarray(block[1:], "<i8").tobytes())
    assert stream.position.epoch >= 2
    assert (PackedConversations.packing, found.hexdigest()[:16]) == (2, "313e7158b52e4d6c")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"sha256": "0"}, "the text has changed since the run"),
        ({"sha256": "0", "packing": None}, "another version of this package fitted the run's conversations into"),
        ({"packing": None}, None),
    ],
)
def test_an_evaluation_says_why_its_text_is_another(tmp_path: Path, changes: dict[str, Any], told: str | None) -> None:
    path = written(tmp_path, [{"messages": said(f"q{n}", "a" * n)} for n in range(9)])
    text: dict[str, Any] = {"name": path, "part": "all", "subset": None, "text_column": "text", "sequences": 2}
    source = open_text(text, tokenizer(), 40, 0)
    text |= {"sha256": digest(source.first_pass(2)), "packing": source.packing} | changes
    facts = {"validation": text, "identity": {"data": {"seq_len": 40, "seed": 0}}}
    model = build_model("qwen3-tiny", dtype=torch.bfloat16, seed=0)
    remarks = own_text(Opened(tmp_path, model, tokenizer(), facts=facts), None, None).remarks
    assert [remark.endswith("the loss is not that of its validation.") for remark in remarks] == [True] * bool(told)
    assert told is None or remarks[0].startswith(told)


# ---- the model beside adapters --------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a model, whose config.json is also beside a checkpoint, in `at`."""
    folder = Path(qwen3(tmp_path / "base"))
    model = build_model(str(folder), dtype=torch.float32, seed=0)
    model.hf.save_pretrained(folder)
    (tmp_path / "at").mkdir()
    (tmp_path / "at" / "config.json").write_bytes((folder / "config.json").read_bytes())
    return folder


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_a_configuration_names_are_those_of_the_base(base: Path, tmp_path: Path) -> None:
    usual, tensors = weights_hash(base), load_file(base / "model.safetensors")
    named = {key: value + 1 for key, value in tensors.items()}
    save_file(named, base / "named.safetensors", metadata={"format": "pt"})
    assert weights_hash(base) == usual, "nothing loads them"
    configure(base, transformers_weights="named.safetensors")
    of_named = weights_hash(base)
    assert of_named != usual
    found = Base(str(base), of_named).weights([torch.float32], tmp_path / "at")
    assert all(torch.equal(found[key], value) for key, value in named.items())
    save_file(tensors, base / "named.safetensors", metadata={"format": "pt"})
    assert weights_hash(base) == usual
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "named.safetensors")}
    (base / "named.safetensors.index.json").write_text(json.dumps(index))
    configure(base, transformers_weights="named.safetensors.index.json")
    assert weights_hash(base) == usual
    for wrong, told in (("../x.safetensors", "not a file name within"), (["x"], r'\["x"\], and must be the name')):
        configure(base, transformers_weights=wrong)
        with pytest.raises(UserError, match=told):
            weights_hash(base)


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00001-model-00001-of-00002.safetensors"])
def test_what_would_be_loaded_beside_the_weights_is_refused(base: Path, name: str) -> None:
    (base / name).write_text("{}")
    with pytest.raises(UserError, match=rf"base holds .*\({name}\)"):
        weights_hash(base)


def test_a_base_is_loaded_as_the_model_that_the_checkpoint_is_of(base: Path, tmp_path: Path) -> None:
    """Whatever its folder's config.json says by then: of this one, transformers would load one layer alone."""
    tensors = load_file(base / "model.safetensors")
    configure(base, num_hidden_layers=1)
    found = Base(str(base), weights_hash(base)).weights([torch.float32], tmp_path / "at")
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


def test_what_takes_long_to_read_is_said_and_read_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, said = list[str](), list[str]()
    digest = hashlib.file_digest

    def slow(file: Any, name: str) -> Any:
        read.append(file.name)
        time.sleep(0.2)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", slow)
    monkeypatch.setattr(bases, "_known", {})
    quick = weights_hash(base, said.append)
    assert said == [] and len(read) == 1
    monkeypatch.setattr(bases, "_known", {})
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 0.05)
    assert weights_hash(base, said.append) == weights_hash(base, said.append) == quick
    assert said == [f"reading the weights in {base}, to note which they are"] and len(read) == 2
