"""The memory model against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from toolkit.memory import Buckets, peak, per_parameter, resident
from toolkit.optim import AMCS, SOAM
from toolkit.optim.layout import Layout, layout, state_formats

SHAPES = [(1000, 512), (512, 512), (512,), (512, 1024)]
MATRICES, VECTORS = 1000 * 512 + 512 * 512 + 512 * 1024, 512
SCALE = 4 / 256


def layouts(rule: Any, state_format: str, weights: str) -> tuple[Layout, Layout]:
    formats = state_formats(rule.rule, state_format, where="test")
    exact = layout(rule.rule, dict.fromkeys(formats, "fp32"), "bf16+16", torch.bfloat16)
    return layout(rule.rule, formats, weights, torch.bfloat16), exact


@pytest.mark.parametrize(
    ("rule", "state_format", "weights", "expected"),
    [
        (AMCS, "8bit", "bf16+8", 2 + 1 + 3 * (1 + SCALE)),
        (AMCS, "compact", "bf16+4", 2 + 0.5 + 2.5 + 3 * SCALE),
        (AMCS, "minimal", "bf16+4", 2 + 0.5 + 2 + 3 * SCALE),
        (SOAM, "8bit", "bf16+16", 2 + 2 + 2 * (1 + SCALE)),
        (SOAM, "compact", "bf16+4", 2 + 0.5 + 1.5 + 2 * SCALE),
    ],
)
def test_bytes_between_steps(rule: Any, state_format: str, weights: str, expected: float) -> None:
    held = resident(SHAPES, *layouts(rule, state_format, weights), stage=2, world_size=1)
    states = len(rule.rule.states)
    assert sum(held.values()) == pytest.approx(expected * MATRICES + (2 + 2 + 4 * states) * VECTORS)


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_share_all_but_the_weights(stage: int) -> None:
    both = layouts(AMCS, "8bit", "bf16+8")
    alone = resident(SHAPES, *both, stage=stage, world_size=1)
    shared = resident(SHAPES, *both, stage=stage, world_size=4)
    assert shared["weights"] == alone["weights"]
    for name in ("m_fast", "m_slow", "v", "remainder"):
        assert shared[name] == alone[name] / 4


def test_stage_3_shares_the_weights_and_pads_matrices_to_whole_blocks() -> None:
    both = layouts(SOAM, "8bit", "bf16+8")
    held = resident([(10, 30)], *both, stage=3, world_size=2)
    assert held["weights"] == 2 * 256 and held["gradients"] == 2 * 256
    assert held["m"] == 256 * (1 + SCALE)


def test_peaks() -> None:
    both = layouts(AMCS, "compact", "bf16+4")
    buckets = Buckets(reduce=1000, prefetch=500, live=2000)  # less than the model
    numel, largest, second = MATRICES + VECTORS, 512 * 1024, 1000 * 512

    def beyond_resident(**settings: Any) -> float:
        stage, ranks = settings["stage"], settings["world_size"]
        held = sum(resident(SHAPES, *both, stage=stage, world_size=ranks).values())
        return sum(peak(SHAPES, *both, buckets=buckets, **settings).values()) - held

    assert beyond_resident(stage=2, world_size=1) == pytest.approx(2 * numel)
    assert beyond_resident(stage=2, world_size=1, released=True) == pytest.approx(2 * largest + 2 * VECTORS)
    assert beyond_resident(stage=1, world_size=2) == pytest.approx(numel + 2 * largest)
    gathered = 2 * (largest + second + 2000 + 500)
    assert beyond_resident(stage=3, world_size=2) == pytest.approx(gathered + 2 * 2 * 1000)
    assert per_parameter({"weights": 2.0 * numel}, SHAPES) == 2.0
