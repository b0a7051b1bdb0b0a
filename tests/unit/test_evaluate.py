"""What `toolkit eval` says of the text that it has read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import call

from toolkit.commands import evaluate as command
from toolkit.data import load_tokenizer
from toolkit.inference.opened import Opened
from toolkit.run.settings import RunSettings

LINE = "import os\n"


class Uniform(torch.nn.Module):
    """Predicts nothing in particular."""

    def __init__(self, positions: int | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.hf = type("hf", (), {"config": type("config", (), {"max_position_embeddings": positions})})

    def forward(self, tokens: Any) -> Any:
        return torch.tensor(2.5)


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(lines: int, *options: object, seq_len: int | None = None, positions: int | None = None) -> Any:
        facts = {"identity": {"data": {"seq_len": seq_len, "seed": 0}}} if seq_len is not None else {}
        model: Any = Uniform(positions)
        opened = Opened(tmp_path / "model", model, load_tokenizer("python-4k"), facts=facts)
        monkeypatch.setattr(command, "opened_run", lambda *arguments: opened)
        text = tmp_path / "text.txt"
        text.write_text(LINE * lines)
        done = call("eval", tmp_path / "model", "--data", text, *options)
        assert done.exit_code == 0, done.output
        return done

    return run


def test_a_text_shorter_than_a_sequence(evaluated: Any) -> None:
    found = json.loads(evaluated(5, "--json", seq_len=128).stdout)
    tokens = found["tokens"]
    assert 1 < tokens < 128 and found["last_seq_len"] == tokens and found["seq_len"] == 128
    shown = evaluated(5, seq_len=128).stdout
    assert f"text.txt: 1 sequence of {tokens} tokens\n" in shown


def test_the_last_sequence_is_said_to_be_shorter(evaluated: Any) -> None:
    found = json.loads(evaluated(5, "--json", seq_len=4).stdout)
    count, last = divmod(found["tokens"], 4)
    assert last and found["sequences"] == count + 1 > 2
    assert f"text.txt: {count + 1} sequences of 4 tokens, the last of {last}\n" in evaluated(5, seq_len=4).stdout
    whole = evaluated(5, "--sequences", 2, seq_len=4).stdout
    assert "text.txt: 2 sequences of 4 tokens\n" in whole


def test_an_exported_model_is_told_which_length_it_gets(evaluated: Any) -> None:
    usual = RunSettings().seq_len
    assert f"exported model {usual})" in " ".join(call("eval", "--help").output.split())
    done = evaluated(500)
    assert f"sequences of {usual} tokens" in done.stdout
    assert f"does not say how long the sequences of its run were: here they have at most {usual} tokens" in done.stderr
    assert "at most 16 tokens" in evaluated(500, positions=16).stderr, "no more than the model can"
    for told in (evaluated(500, "--seq-len", 32), evaluated(500, seq_len=32)):
        assert "note" not in told.stderr and "of 32 tokens" in told.stdout
