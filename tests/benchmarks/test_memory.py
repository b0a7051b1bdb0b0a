"""The peak of a real training step against the memory model, on a model small enough for every test run."""

from __future__ import annotations

import pytest
from memory import predict, run

MODEL = "qwen3-tiny"


@pytest.mark.parametrize(("name", "least"), [("AMCS compact, bf16+4", 0.97), ("AMCS compact, bf16+4, released", 0.95)])
def test_the_measured_peak_is_the_predicted_one(name: str, least: float) -> None:
    """What is held for a moment beside model state, activations and logits, is 1.5 % of a model of 5M parameters."""
    [found] = run(name, stage=2, world_size=1, model=MODEL, offload=False)
    peak = found["peak"] / found["parameters"]
    predicted = predict(name, 2, 1, MODEL)
    assert predicted is not None
    assert least < predicted / peak <= 1.001, (peak, predicted)
    assert found["resident"] / found["parameters"] == pytest.approx(5.05, rel=0.005)
