"""What measuring memory costs: the time of a training step at each level of the ledger, taken in turn.

    python tests/benchmarks/ledger_cost.py [--rounds 8] [--steps 5] [--model qwen3-tiny] [--seq-len 256]

One process trains one model. In every round it makes `--steps` steps without a ledger, then as many at level "off"
and at "summary", in an order that turns from round to round, each after three steps that are not timed. The table has
the median of all steps, and of the rounds' ratios to no ledger. What the ledger itself took is on its own clock: on a
busy machine the better figure. At last five steps at "full", of which the third is traced.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

LEVELS = ("none", "off", "summary")


def build(options: argparse.Namespace) -> Any:
    import toolkit
    from toolkit import models
    from toolkit.config import load_config

    config = load_config("amcs_zero2") | {"train_micro_batch_size_per_gpu": options.micro_batch}
    model = models.build_model(options.model, dtype=torch.bfloat16, seed=0, loss="plain")
    return toolkit.initialize(model=model, config=config, total_steps=1000)[0]


def steps(engine: Any, tokens: torch.Tensor, count: int) -> list[float]:
    """Seconds of each of `count` steps."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        float(loss.detach())  # on a GPU: waits for it
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--model", default="qwen3-tiny")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()

    from toolkit.run import ranks

    ranks.prepare_environment()
    device = ranks.start()
    from toolkit import memory

    if device.type == "cpu":
        memory.count_from_here()
    engine = build(options)
    shape = (options.micro_batch, options.seq_len + 1)
    tokens = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0)).to(device)
    steps(engine, tokens, 3)
    taken: dict[str, list[float]] = {level: [] for level in LEVELS}
    ratios: dict[str, list[float]] = {level: [] for level in LEVELS}
    each: list[float] = []
    once: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            medians = {}
            for level in LEVELS[turn % 3 :] + LEVELS[: turn % 3]:
                ledger = memory.watch(engine, folder, level) if level != "none" else None  # type: ignore[arg-type]
                steps(engine, tokens, 3)
                began = ledger.record().overhead_seconds if ledger is not None and level == "summary" else 0.0
                found = steps(engine, tokens, options.steps)
                if ledger is not None and level == "summary":
                    ended = ledger.record().overhead_seconds
                    each.append((ended - began) / options.steps)
                    ledger.close()
                    once.append(began + ledger.record().overhead_seconds - ended)
                elif ledger is not None:
                    ledger.close()
                taken[level] += found
                medians[level] = statistics.median(found)
            for level in LEVELS:
                ratios[level].append(medians[level] / medians["none"])
        ledger = memory.watch(engine, folder, "full", step=3)
        found = steps(engine, tokens, 5)
        ledger.close()
        size = Path(folder, "memory", "rank0-snapshot.pickle").stat().st_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{name}; torch {torch.__version__}, Python {platform.python_version()}; {options.model}, {shape}")
    print(f"{'level':10}{'ms a step':>12}{'to none':>10}   n = {options.rounds} rounds of {options.steps} steps")
    for level in LEVELS:
        print(f"{level:10}{1e3 * statistics.median(taken[level]):12.2f}{statistics.median(ratios[level]):10.4f}")
    spent = statistics.median(each)
    share = spent / statistics.median(taken["none"])
    setting_up = 1e3 * statistics.median(once)
    print(f"summary's own time: {1e3 * spent:.3f} ms a step, {100 * share:.3f} %; {setting_up:.1f} ms once")
    untraced = statistics.median([found[1], found[3], found[4]])
    print(
        f"full: the traced step {1e3 * found[2]:.0f} ms, others {1e3 * untraced:.0f} ms; "
        f"snapshot {size / 1e6:.1f} MB (once a run)"
    )
    ranks.finish()


if __name__ == "__main__":
    main()
