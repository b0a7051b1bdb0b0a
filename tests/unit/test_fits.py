"""`toolkit fits`: what it calls the longest sequence fits, and the next one does not."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from toolkit import cli
from toolkit.errors import UserError
from toolkit.estimate.fits import SHORTEST, fits, lengths, ways
from toolkit.estimate.predict import Case, Estimator, assumed_context
from toolkit.records.activations import Activations
from toolkit.records.lora import LoRA

MODEL = "qwen3-tiny"
CONTEXT = assumed_context(1)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["toolkit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_longest_that_fits_is_found_and_no_longer_one() -> None:
    tried = ways(["AdamW", "AMCS"], 1, "8bit", offload=False)
    assert [(way.optimizer, way.state) for way in tried] == [
        ("AdamW", "fp32"),
        ("AMCS", "8bit, bf16+8"),
        ("AMCS", "8bit, bf16+8, released"),
    ]
    estimator, candidates = Estimator(), lengths(MODEL)
    peaks = {
        (way.optimizer, way.state): [
            estimator.predict(
                Case(MODEL, way.config, 1, 1, seq_len, activations=Activations(checkpoint=True), loss="chunked")
            ).needed
            for seq_len in candidates
        ]
        for way in tried
    }
    between = (peaks["AMCS", "8bit, bf16+8"][1] + peaks["AMCS", "8bit, bf16+8"][2]) // 2
    memories = [CONTEXT + 1000, between, 80 * 10**9]
    for fit in fits(MODEL, tried, memories, 1):
        needs = peaks[fit.optimizer, fit.state]
        fitting = [seq_len for seq_len, need in zip(candidates, needs, strict=True) if need <= fit.gpu_memory]
        assert fit.seq_len == (fitting[-1] if fitting else None)
        assert fit.needs == needs[candidates.index(fit.seq_len or SHORTEST)]
        assert fit.whole == (fit.gpu_memory == memories[-1])


def test_adapters_and_conversations_are_priced() -> None:
    pytest.importorskip("peft")
    [way] = [one for one in ways(["AMCS"], 1, "8bit", offload=False) if "released" not in one.state]
    estimator = Estimator()
    for extra in ({"lora": LoRA(4)}, {"conversations": True}):
        [fit] = fits(MODEL, [way], [80 * 10**9], 1, Activations(checkpoint=True), **extra)  # type: ignore[arg-type]
        checkpointed: dict[str, Any] = {"activations": Activations(checkpoint=True), "loss": "chunked"}
        case = Case(MODEL, way.config, 1, 1, 4096, **checkpointed, **extra)
        plain = Case(MODEL, way.config, 1, 1, 4096, **checkpointed)
        assert fit.needs == estimator.predict(case).needed
        assert (fit.needs < estimator.predict(plain).needed) == ("lora" in extra)


def test_lengths_end_with_what_the_model_takes() -> None:
    assert lengths(MODEL) == [512, 1024, 2048, 4096]
    assert lengths("qwen3-8b")[-2:] == [32_768, 40_960]


def test_ways_follow_the_gpus_and_the_rule() -> None:
    several = ways(["AMCS"], 8, "compact", offload=False)
    assert [way.state for way in several] == ["compact, bf16+4", "compact, bf16+4, released"]
    assert {way.config["zero_optimization"]["stage"] for way in several} == {3}
    assert [way.state for way in ways(["muon8"], 1, "8bit", offload=False)] == [
        "8bit, bf16+8",
        "8bit, bf16+8, released",
    ]
    [way] = ways(["AMCS"], 1, "8bit", offload=True)
    assert way.config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    with pytest.raises(UserError, match=r"--optimizer is 'AMSC', but must be .* Did you mean 'AMCS'"):
        ways(["AMSC"], 1, "8bit", offload=False)


def test_the_command_prints_a_table_for_each_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    given = ["fits", "--model", MODEL, "--gpu-memory", "1GB", "--gpu-memory", "24GB", "--optimizer", "amcs"]
    assert run(monkeypatch, *given) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[1:])) <= 80
    rows = [line.split() for line in out.splitlines() if line.startswith(MODEL)]
    assert rows == [[MODEL, "-", "-"], [MODEL, "4,096*", "4,096*"]]
    assert run(monkeypatch, *given, "--json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [one["seq_len"] for one in found] == [None, 4096, None, 4096]


def test_what_state_was_measured_to_cost_is_said_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["fits", "--model", MODEL, "--gpu-memory", "24GB", "--optimizer"]
    assert run(monkeypatch, *given, "muon8", "--optimizer", "amcs", "--optimizer", "adamw") == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "validation loss beside that of fp32 state (small models, ± 2 standard errors):",
        "  Muon8: 8bit +0.005 ± 0.002, above its bound of 0.003",
        "  AMCS: 8bit -0.005 ± 0.005",
    ]
    assert run(monkeypatch, *given, "amcs", "--state-format", "fp32") == 0
    assert "validation loss" not in capsys.readouterr().out


def test_what_is_kept_of_activations_is_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [way, *_] = ways(["AMCS"], 1, "8bit", offload=False)
    full, kept = (fits(MODEL, [way], [10**9], 1, Activations.read(words))[0].needs for words in ("full", "checkpoint"))
    assert kept < full
    given = ["fits", "--model", MODEL, "--gpu-memory", "24GB", "--optimizer", "amcs"]
    assert run(monkeypatch, *given, "--activations", "offload,tiled") == 0
    assert "activations offload,tiled" in " ".join(capsys.readouterr().out.split())
    assert run(monkeypatch, *given, "--activations", "tile") == 2
    assert "Did you mean 'tiled'?" in capsys.readouterr().err


def test_wrong_values_end_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "fits", "--gpu-memory", "lots") == 2
    assert "--gpu-memory is 'lots', but must be a size" in capsys.readouterr().err
    assert run(monkeypatch, "fits", "--model", "qwen3-9b") == 2
    assert "qwen3-9b" in capsys.readouterr().err
