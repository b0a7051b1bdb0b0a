"""SOAM's bound on the update of each parameter, relative to its size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import soam
from torch import nn

from toolkit.errors import UserError
from toolkit.optim import SOAM

SIZES = {"small": 1e-2, "large": 1.0, "zeros": 0.0}
SHAPE, LR, STEPS, BOUND = (30, 50), 1e-2, 6, 0.05


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: size * rng.normal(size=SHAPE) for name, size in SIZES.items()}


def gradients() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{name: 1e-2 * rng.normal(size=SHAPE) for name in SIZES} for _ in range(STEPS)]


def train(max_update: float | None, state_format: str = "fp32") -> dict[str, np.ndarray]:
    params = {name: nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in start().items()}
    kept = {"state_format": state_format, "compile": False}
    optimizer = SOAM(params.values(), lr=LR, weight_decay=0.1, max_update=max_update, **kept)
    for by_name in gradients():
        for name, p in params.items():
            p.grad = torch.tensor(by_name[name], dtype=torch.float32)
        optimizer.step()
    return {name: p.detach().double().numpy() for name, p in params.items()}


def reference(max_update: float) -> dict[str, np.ndarray]:
    found = {}
    for name, theta in start().items():
        update = soam(LR, 0.1, max_update=max_update)
        for t, by_name in enumerate(gradients(), 1):
            theta = update(theta, by_name[name], t)
        found[name] = theta
    return found


def test_updates_are_bounded_relative_to_their_parameter() -> None:
    got, want, free = train(BOUND), reference(BOUND), reference(np.inf)
    for name, value in want.items():
        moved = np.linalg.norm(value - start()[name])
        assert np.linalg.norm(got[name] - value) < 1e-4 * moved, name
        bound = np.linalg.norm(free[name] - start()[name]) > 1.5 * moved
        assert bound == (name != "large"), name


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_where_nothing_is_larger_it_is_soam(state_format: str) -> None:
    free, bounded = train(None, state_format), train(1e6, state_format)
    assert all(np.array_equal(free[name], bounded[name]) for name in SIZES)


@pytest.mark.parametrize("value", [0, -1.0, True, float("inf")])
def test_a_bound_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="SOAM: max_update is "):
        SOAM([nn.Parameter(torch.zeros(2, 2))], max_update=value)
