"""One rank that trains matrices whose sizes are no multiples of a block, at each ZeRO stage, and saves checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ranks import serve
from torch import Tensor, nn

import toolkit
from toolkit.checkpoint.store import Store
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.run.saving import Saver
from toolkit.zero.checkpoint import load

SHAPES = {"a": (5, 7), "b": (16, 16), "c": (17, 1000), "d": (10,), "e": (300, 3), "f": (24, 32)}


class Net(nn.Module):
    """Gradients that are known for each element by itself, so that no order of sums matters."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        terms = [(p * torch.randn(SHAPES[name], generator=generator)).sum() for name, p in self.named_parameters()]
        return torch.stack(terms).float().sum()


def build(stage: int) -> Any:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,  # a norm is a sum, whose order differs
        "zero_optimization": {"stage": stage},
        "optimizer": {
            "type": "AMCS",
            "params": {"lr": 1e-2, "total_steps": 50, "compile": False, "state_format": "compact", "weights": "bf16+4"},
        },
        "steps_per_print": 10**9,
    }
    return toolkit.initialize(Net(), config)[0]


def save(folder: str, stage: int, steps: int, source: str | None = None) -> list[str]:
    """Train `steps` steps, from a checkpoint on if one is given, and save; what was said of the state."""
    engine = build(stage)
    said = [] if source is None else load(engine, open_checkpoint(Path(source)))
    for _ in range(steps):
        engine.backward(engine(engine.global_steps))
        engine.step()
    saver = Saver(engine, Store(Path(folder)))
    saver.now(engine.global_steps, {})
    saver.close()
    return said


if __name__ == "__main__":
    serve({"save": save})
