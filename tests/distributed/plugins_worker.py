"""One rank of a run of rules: gradients that are known beforehand, at every stage.

Started by `ranks.launch` from `test_plugins.py`, with the path of a JSON of settings as only argument.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import toolkit
from toolkit.zero import compile_step, full_precision_state_dict, rule_optimizer

SHAPES = {"embed_tokens": (50, 40), "self_attn": (64, 64), "mlp": (40, 136), "norm": (300,), "lm_head": (7, 300)}
"""By the name of a module, which says its component; most are no whole blocks. `norm` and the biases are 1-D."""


class Leaf(nn.Module):
    """The gradient of its parameters is what it is given."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=generator))
        self.bias = nn.Parameter(torch.randn(shape[-1:], generator=generator))

    def forward(self, weight: Tensor, bias: Tensor) -> Tensor:
        return (self.weight.float() * weight).sum() + (self.bias.float() * bias).sum()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.add_module(name, Leaf(shape, generator))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        leaves = [getattr(self, name)(gradients[f"{name}.weight"], gradients[f"{name}.bias"]) for name in SHAPES]
        return torch.stack(leaves).sum()


def gradients(step: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: 1e-2 * torch.randn(p.shape, generator=generator) for name, p in sorted(Model().named_parameters())}


def train(case: dict[str, Any]) -> dict[str, Any]:
    model = Model()
    engine, *_ = toolkit.initialize(model=model, config=case["config"])
    if case["warm"]:
        compile_step(engine)
    for step in range(case["steps"]):
        rank = 0 if case["same"] else dist.get_rank()
        engine.backward(engine(gradients(step, rank)))
        engine.step()
    optimizer = rule_optimizer(engine)
    assert optimizer is not None
    small = sorted(optimizer.whole_states())
    zero = engine.zero_optimization_stage() > 0
    weights = full_precision_state_dict(engine) if zero else dict(engine.module.named_parameters())
    result = {
        "weights": {name: value.detach().float().clone() for name, value in weights.items()},
        "small": [{name: held[name].clone() for name in small if name in held} for held in optimizer.state.values()],
        "bytes": optimizer.state_bytes(),
        "norm": engine.get_global_grad_norm(),
    }
    engine.destroy()
    return result


def main() -> None:
    settings = json.loads(Path(sys.argv[-1]).read_text())
    for plugin in settings["plugins"]:
        runpy.run_path(plugin)
    results = {name: train(case) for name, case in settings["cases"].items()}
    torch.save(results, Path(settings["out"]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
