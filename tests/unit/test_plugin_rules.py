"""Rules in files of their own, outside the package, follow the papers' equations."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from toolkit.optim import RULES

PLUGINS = Path(__file__).parents[1] / "plugins"
sys.path.insert(0, str(PLUGINS))

from references import REFERENCES, follow  # noqa: E402

LINES = {"Lion": 30, "QHAdam": 45, "StableAdamW": 50, "Adafactor": 70, "Muon": 70}
SHAPES = ((40, 136), (7, 5, 3), (300, 1), (1000,), (3,), (2, 700_000))
"""No whole blocks, rows longer than what is measured at a time, and n-D."""


@pytest.fixture(scope="module", autouse=True)
def plugins() -> Iterator[None]:
    before = dict(RULES)
    for name in LINES:
        runpy.run_path(str(PLUGINS / f"{name.lower()}.py"))
    yield
    RULES.clear()
    RULES.update(before)


def train(name: str, shapes: Any, steps: int = 4, **settings: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Weights before and after, and the gradients of every step by parameter."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    start = [p.detach().clone().numpy() for p in params]
    optimizer = RULES[name](params, lr=1e-2, **settings)
    gradients: list[list[Any]] = [[] for _ in params]
    for _ in range(steps):
        for p, seen in zip(params, gradients, strict=True):
            p.grad = 1e-2 * torch.randn(p.shape, generator=generator) ** 3
            seen.append(p.grad.numpy())
        optimizer.step()
    return start, [p.detach().numpy() for p in params], gradients


@pytest.mark.parametrize("name", LINES)
def test_a_plugin_follows_its_equations(name: str) -> None:
    compiled = name in ("StableAdamW", "Adafactor")  # which takes seconds for each kernel
    start, got, gradients = train(name, SHAPES, state_format="fp32", compile=compiled)
    for before, after, seen in zip(start, got, gradients, strict=True):
        want = follow(name, 1e-2, before, seen)
        moved = np.linalg.norm(want - before)
        assert moved > 0 and np.linalg.norm(after - want) < 2e-5 * moved, (name, before.shape)


@pytest.mark.parametrize("name", LINES)
def test_a_plugin_is_short(name: str) -> None:
    text = (PLUGINS / f"{name.lower()}.py").read_text()
    assert len(text[text.index("class ") :].rstrip().splitlines()) <= LINES[name]
    assert name in REFERENCES


def test_a_prediction_says_what_it_leaves_out() -> None:
    from toolkit.estimate.predict import Case, Estimator

    for name, says in (("Lion", False), ("Adafactor", True), ("Muon", True)):
        config = {"optimizer": {"type": name, "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 2}}
        settings = config | {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
        case = Case("qwen3-tiny", settings, 2, 1, 8, device="cpu", activation_checkpointing=False, loss="plain")
        remarks = Estimator().predict(case).remarks
        assert any("whole parameters" in remark for remark in remarks) == says, remarks
