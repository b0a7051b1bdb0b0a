"""Peaks of real training steps against `toolkit estimate`, on a model small enough for every test run.

`prediction.py` has all cases.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from memory import base, configuration, launch, ours
from ranks import launched

from toolkit.estimate.predict import Case, Estimator
from toolkit.models import cpu_matmul
from toolkit.records.activations import Activations
from toolkit.records.categories import BACKWARD, STEP, is_model_state

MODEL = "qwen3-tiny"


@pytest.mark.parametrize(
    ("name", "stage", "ranks", "seq_len", "activations"),
    [
        ("AMCS 8bit, bf16+8", 3, 2, 96, "checkpoint"),
        ("AMCS lean, bf16, released", 2, 1, 8, "full"),
        ("AdamW", 2, 1, 64, "checkpoint"),
        # Of a bucket's parts for other ranks no more than two are there at a time.
        pytest.param("AMCS 8bit, bf16+8", 2, 4, 8, "checkpoint", marks=pytest.mark.slow),
        pytest.param("AMCS 8bit, bf16+8, released", 3, 1, 8, "full", marks=pytest.mark.slow),
        pytest.param("AMCS compact, bf16+4, released", 3, 1, 8, "full", marks=pytest.mark.slow),
    ],
)
def test_the_measured_peak_is_the_predicted_one(
    name: str, stage: int, ranks: int, seq_len: int, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What bf16 products take within themselves depends on the processor: with AMX, a copy of an operand.
    monkeypatch.setenv(cpu_matmul.VARIABLE, "fp32")
    config = configuration(name, stage)
    found = launch(config, ranks, launched, model=MODEL, seq_len=seq_len, activations=activations)
    largest = max(found, key=lambda one: one["peak"])
    case = Case(MODEL, config, ranks, 1, seq_len, device="cpu", activations=Activations.read(activations), loss="plain")
    predicted = Estimator().predict(case)
    assert predicted.peak == pytest.approx(largest["peak"], rel=0.01)
    held = next(phase.held for phase in predicted.phases if phase.name == largest["phase"])

    def model_state(by_category: dict[str, int]) -> int:
        return sum(size for category, size in by_category.items() if is_model_state(category))

    assert model_state(held) == pytest.approx(model_state(largest["held"]), rel=0.02)
    # Every byte of the peak has a name.
    assert largest["held"].get("other", 0) < 0.03 * largest["peak"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "stage", "phase"),
    [
        ("Muon8", 2, BACKWARD),  # where gradients are released
        ("Muon8", 1, STEP),
        ("Adafactor8", 3, STEP),
        ("Lamb8", 2, BACKWARD),
    ],
)
def test_what_is_measured_of_a_rule_that_looks_at_whole_parameters_is_the_prediction(
    rule: str, stage: int, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu_matmul.VARIABLE, "fp32")
    # Matrices are large beside everything else, and of more elements than go through a buffer at a time.
    shape = {"hidden_size": 512, "intermediate_size": 3072, "num_attention_heads": 4, "num_key_value_heads": 2}
    transformers.Qwen3Config(vocab_size=96, num_hidden_layers=2, head_dim=128, **shape).save_pretrained(tmp_path)
    config = base(stage) | ours(rule, "8bit", "bf16+8", release_gradients=phase == BACKWARD)
    found = launch(config, 2, launched, model=str(tmp_path), seq_len=8, steps=2)
    case = Case(str(tmp_path), config, 2, 1, 8, device="cpu", activations=Activations(), loss="plain")
    [predicted] = [one.peak for one in Estimator().predict(case).phases if one.name == phase]
    assert predicted == pytest.approx(max(one[phase] for one in found), rel=0.01)
