"""One rank of two steps with released gradients, the first of which is skipped half-way; or of other `factors`.

Started by `ranks.launch` from `test_release.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import toolkit
from toolkit.zero import release, rule_optimizer


class Model(nn.Module):
    """Two matrices of one parameter group: of two ranks each holds one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(64, 64, bias=False) for _ in range(2))
        self.norm = nn.Parameter(torch.ones(300))

    def forward(self, factor: float) -> Tensor:
        early = (self.first.weight.float() * factor).sum()  # its gradient comes last
        return early + self.last.weight.float().square().sum() + self.norm.float().square().sum()


def main() -> None:
    settings = json.loads(Path(sys.argv[-1]).read_text())
    found = {}
    release.to_host = torch.clone  # what is moved to the host of a device is copied
    for name, config in settings["cases"].items():
        torch.manual_seed(0)
        engine, *_ = toolkit.initialize(model=Model(), config=config)
        if name in ("delayed", "moved"):
            engine.optimizer._delays = True  # as on a device
        engine.optimizer._offloads = name == "moved"
        allocated, after = [], []
        for factor in settings.get("factors", (float("nan"), 1.0)):
            loss = engine(1.0) * factor if name == "lost" else engine(factor)
            engine.backward(loss)
            # At stage 3 they wait in a buffer.
            waiting = [gradient for held in getattr(engine.optimizer, "_held", ()) for gradient in held.values()]
            engine.step()
            # They are small, and stay whole between steps at stage 3, too.
            after.append([weight.detach().float() for _, weight in sorted(engine.module.named_parameters())])
            allocated.append([set(held) for held in engine.basic_optimizer.state.values()])
        optimizer = rule_optimizer(engine)
        assert optimizer is not None
        found[name] = {
            "steps": [held["step"] for held in optimizer.state.values()],
            "allocated": allocated,
            "skipped": engine.skipped_steps,
            "waiting": sum(gradient.nbytes for gradient in waiting),
            "kept": sum(gradient.untyped_storage().nbytes() for gradient in waiting),
            "rows": [held["v.rows"] for held in optimizer.state.values() if "v.rows" in held],
            "weights": after[-1],
            "after the first": after[0],
        }
        engine.destroy()
    torch.save(found, Path(settings["out"]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
