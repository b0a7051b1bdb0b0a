"""Engines of one rank in this process, around a small network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import toolkit

BASE = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": None,
}


class Net(nn.Module):
    """Matrices that are no whole number of blocks, and tensors of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.norm = nn.LayerNorm(40)
        self.down = nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.down(self.norm(self.up(x)).relu()).float().square().mean()
        return loss


def build(config: Mapping[str, Any]) -> Any:
    """`toolkit.initialize` on a network with the same weights each time; wants the fixture `one_rank`."""
    torch.manual_seed(0)
    engine, *_ = toolkit.initialize(model=Net(), config=config)
    return engine


def step(engine: Any) -> float:
    """One training step; the loss before it."""
    dtype = next(engine.module.parameters()).dtype
    for _ in range(engine.gradient_accumulation_steps()):
        loss = engine(torch.randn(1, 24).to(engine.device, dtype))
        engine.backward(loss)
        engine.step()
    return float(loss.detach())
