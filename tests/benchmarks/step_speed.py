"""How long one optimizer step takes, ours against others', on the same tensor in one run.

    python tests/benchmarks/step_speed.py [--numel 33554432] [--device cpu] [--repeats 10]

Prints the median and best milliseconds of a step and the ratio to AMCS 8bit; then AMCS in bf16 by way of keeping
weights, with the ratio to fp32 master weights. bitsandbytes comes with
`pip install leanstate[compare]`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from toolkit.optim import AMCS, SOAM


def contenders() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """Optimizers by name; bitsandbytes' and DeepSpeed's only where they can be had."""
    made: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "AMCS 8bit": lambda p: AMCS(p, total_steps=1000),
        "AMCS fp32 state": lambda p: AMCS(p, total_steps=1000, state_format="fp32"),
        "SOAM 8bit": lambda p: SOAM(p),
        "torch AdamW (fused)": lambda p: torch.optim.AdamW(p, fused=True),
    }
    try:
        import bitsandbytes as bnb

        made["bitsandbytes AdamW8bit"] = lambda p: bnb.optim.AdamW8bit(p)
        made["bitsandbytes AdEMAMix8bit"] = lambda p: bnb.optim.AdEMAMix8bit(p)
    except ImportError:
        print("bitsandbytes is not installed: its optimizers are left out")
    return made


def measure(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], numel: int, device: str, repeats: int
) -> list[float]:
    """Milliseconds of each of `repeats` steps on one fp32 parameter of `numel` elements, after two to warm up."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(numel // 1024, 1024, device=device))
    parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer = make([parameter])
    times = []
    for _ in range(repeats + 2):
        _synchronize(device)
        start = time.perf_counter()
        optimizer.step()
        _synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times[2:]


def weight_contenders(numel: int, device: str) -> dict[str, Callable[[], None]]:
    """One step of AMCS as it runs under ZeRO in bf16, by way of keeping weights.

    "fp32" updates DeepSpeed's master weights and copies them into the model; the others update the model's.
    """
    made: dict[str, Callable[[], None]] = {}
    torch.manual_seed(0)
    start = torch.randn(numel // 1024, 1024, device=device).bfloat16()
    gradient = (torch.randn_like(start) * 1e-3).flatten()
    scale = torch.ones((), device=device)
    for state_format, weights in (
        ("8bit", "fp32"),
        ("8bit", "bf16+16"),
        ("8bit", "bf16+8"),
        ("8bit", "bf16+4"),
        ("compact", "bf16+4"),
        ("minimal", "bf16+4"),
    ):
        model = nn.Parameter(start.clone())
        held = nn.Parameter(start.float()) if weights == "fp32" else model
        optimizer = AMCS([held], total_steps=1000, state_format=state_format, weights=weights)

        def step(optimizer: AMCS = optimizer, held: nn.Parameter = held, model: nn.Parameter = model) -> None:
            with torch.no_grad():
                stream = optimizer.begin(optimizer.param_groups[0], held).stream(first_block=0)
                stream.add(gradient, scale)
                stream.finish(scale)
                if held is not model:
                    model.copy_(held)

        made[f"AMCS {state_format}, {weights} weights"] = step
    return made


def measure_in_turn(steps: dict[str, Callable[[], None]], device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turn, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, step in steps.items():
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken[2:]) for name, taken in times.items()}


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=32 * 2**20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {options.numel:,} parameters")
    found = {}
    for name, make in contenders().items():
        times = measure(make, options.numel, options.device, options.repeats)
        found[name] = statistics.median(times)
        ratio = found[name] / found["AMCS 8bit"]
        print(f"{name:28} median {found[name]:9.2f} ms   best {min(times):9.2f} ms   {ratio:6.2f} x AMCS 8bit")
    by_weights = measure_in_turn(weight_contenders(options.numel, options.device), options.device, options.repeats)
    base = by_weights["AMCS 8bit, fp32 weights"]
    for name, median in by_weights.items():
        print(f"{name:32} median {median:9.2f} ms   {median / base:6.2f} x fp32 weights")


if __name__ == "__main__":
    main()
