"""What a step costs the host: seconds of Python and of queueing in ZeRO's step, kernels replaced by functions that do
nothing.

    python tests/benchmarks/host_time.py --model qwen3-134m --model qwen3-8b --stage 2

A model has as many tensors as the real one, in the same groups, and pieces of gradients are joined as on a GPU; only
every dimension is cut, so that what is still computed here (the norm, the joining) takes a CPU next to no time.
On a GPU the device's queue takes what is launched here; what a launch costs there is not measured.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import ranks

import toolkit
from toolkit.models import build
from toolkit.optim import kernel, streaming
from toolkit.state.codecs import BLOCK
from toolkit.zero import stage12

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
}
GRID = 16
"""Dimensions stay multiples of it, so that a matrix stays whole blocks."""


class Small(nn.Module):
    """The parameters of `model` under their names, every dimension divided by `cut`; its loss is their sum."""

    def __init__(self, model: nn.Module, cut: int) -> None:
        super().__init__()
        self.model = model
        made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
        for module in model.modules():
            module._buffers.clear()
            for name, parameter in module.named_parameters(recurse=False):
                shape = [-(-size // (cut * GRID)) * GRID for size in parameter.shape]
                new = nn.Parameter(torch.full(shape, 0.01, dtype=torch.bfloat16))
                setattr(module, name, made.setdefault(parameter, new))

    def forward(self) -> Tensor:
        return torch.stack([parameter.sum(dtype=torch.float32) for parameter in self.model.parameters()]).sum()


def norm_as_on_a_gpu(tensors: Sequence[Tensor], device: Any) -> Tensor:
    """What `squared_norm` does there, a few kernels for all tensors; a CPU takes them one by one, which `norm` says."""
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum()


def torch_adamw(tensors: Sequence[Tensor], steps: int) -> float:
    """Milliseconds of a step of torch's fused AdamW on tensors like these: one call for all of a type."""
    held = [nn.Parameter(torch.zeros_like(tensor)) for tensor in tensors]
    for one in held:
        one.grad = torch.zeros_like(one)
    optimizer, seconds = torch.optim.AdamW(held, fused=True), []
    for _ in range(steps):
        began = time.thread_time()
        optimizer.step()
        seconds.append(time.thread_time() - began)
    return 1e3 * statistics.median(seconds[2:])


def measure(model: str, optimizer: str, stage: int, cut: int, steps: int, profile: bool) -> dict[str, Any]:
    """Milliseconds of `engine.step`, kernels called in it, and tensors of the model."""
    whole = build.blueprint(model, dtype=torch.bfloat16)
    real = sum(parameter.numel() for parameter in whole.parameters())
    small = Small(whole, cut)
    tensors = [parameter.numel() for parameter in small.parameters()]
    calls = 0

    def compiled(*arguments: Any) -> Any:
        def nothing(*tensors: Any) -> None:
            nonlocal calls
            calls += 1

        return nothing

    in_norm: list[float] = []

    def timed_norm(tensors: Sequence[Tensor], device: Any) -> Tensor:
        began = time.thread_time()
        found = norm_as_on_a_gpu(tensors, device)
        in_norm.append(time.thread_time() - began)
        return found

    kernel.compile_blocks, stage12.squared_norm = compiled, timed_norm
    kernel.step_function.cache_clear()
    streaming.STAGED["cpu"] = max(BLOCK, streaming.STAGED_ELSEWHERE * sum(tensors) // real)
    params = {"lr": 1e-3} | ({"total_steps": 1000} if optimizer == "AMCS" else {})
    config = CONFIG | {
        "optimizer": {"type": optimizer, "params": params | {"weights": "bf16+8"}},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = toolkit.initialize(model=small, config=config)
    seconds, counted = [], []
    for _ in range(steps):
        engine.backward(engine())
        calls, began = 0, time.thread_time()  # of this thread alone, whatever else runs on the machine
        engine.step()
        seconds.append(time.thread_time() - began)
        counted.append(calls)
    if profile:
        engine.backward(engine())
        with cProfile.Profile() as profiled:
            engine.step()
        pstats.Stats(profiled).sort_stats("tottime").print_stats(30)
    engine.destroy()
    return {
        "model": model,
        "optimizer": optimizer,
        "stage": stage,
        "tensors": len(tensors),
        "groups": len(engine.optimizer.optimizer.param_groups),
        "calls": counted[-1],
        "milliseconds": round(1e3 * statistics.median(seconds[2:]), 3),
        "least": round(1e3 * min(seconds[2:]), 3),
        "norm": round(1e3 * statistics.median(in_norm[2:]), 3),
        "torch_adamw": round(torch_adamw(list(small.parameters()), steps), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--optimizer", default="AMCS")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    parser.add_argument("--cut", type=int, default=128, help="every dimension is divided by this")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(ranks.free_port()), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    toolkit.register()
    for model in arguments.model:
        print(
            json.dumps(
                measure(model, arguments.optimizer, arguments.stage, arguments.cut, arguments.steps, arguments.profile)
            )
        )


if __name__ == "__main__":
    main()
