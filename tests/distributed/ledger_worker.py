"""Ranks for `test_ledger_ranks.py`. The first argument says what to do; the last is a JSON of settings.

plain: a training loop of one's own around a plain `deepspeed.initialize`, with the three lines of the ledger.
train: `toolkit.train` with `settings["arguments"]`, after rank `settings["rank"]` was left `settings["room"]` bytes of
address space.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any


def plain(settings: dict[str, Any]) -> None:
    import deepspeed
    import torch
    from torch import nn

    import toolkit.memory

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    before = vars(engine).copy()
    ledger = toolkit.memory.watch(engine, run_dir=settings["out"], level=settings["level"])
    for step in range(settings["steps"]):
        for _ in range(2):
            x = torch.randn(4, 64, dtype=torch.bfloat16)
            loss = engine(x).float().square().mean()  # outside of the engine
            engine.backward(loss)
            engine.step()
        if step == 1:
            engine.eval()
            with torch.no_grad():
                engine(x)
            engine.train()
            engine.save_checkpoint(settings["out"] + "/saved")
    ledger.close()
    assert not [name for name, value in vars(engine).items() if callable(value) and name not in before]


def train(settings: dict[str, Any]) -> int:
    import deepspeed  # noqa: F401 (its libraries are not what is to be limited)
    import psutil
    import torch

    import toolkit.train

    torch.empty(1)
    if os.environ["RANK"] == str(settings["rank"]):
        most = psutil.Process().memory_info().vms + settings["room"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return toolkit.train.main(settings["arguments"])


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[-1]).read_text())
    sys.exit(train(given) if sys.argv[-2] == "train" else plain(given))
