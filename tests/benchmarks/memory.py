"""Peak memory of whole training steps, by optimizer, format, ZeRO stage and number of ranks.

    python tests/benchmarks/memory.py                       # one rank, stage 2: the table of docs/benchmarks
    python tests/benchmarks/memory.py --ranks 2 --stages 1 2 3

Every allocation of a real `deepspeed` run on CPU ranks is counted by torch's profiler, from before the model exists;
on a GPU the caching allocator's peak is taken. With 8 tokens a step activations vanish and what is left is model
state: weights, remainders, gradients, optimizer state, buckets and transients. "predicted" is what `toolkit estimate`
computes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BUCKET = 4_194_304
TOKENS = 8
WORKER = Path(__file__).with_name("memory_worker.py")


def base(stage: int, buckets: bool = True) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if buckets:
        zero |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, "overlap_comm": False}
        if stage == 3:
            zero |= {"sub_group_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}
            zero |= {"stage3_max_live_parameters": 4 * BUCKET, "stage3_max_reuse_distance": 4 * BUCKET}
            zero |= {"stage3_param_persistence_threshold": 16_384}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def ours(rule: str, state_format: str | dict[str, str], weights: str, **extra: Any) -> dict[str, Any]:
    params = {"lr": 1e-4, "state_format": state_format, "weights": weights} | extra
    return {"optimizer": {"type": rule, "params": params}}


FOUR = {"m_fast": "4bit", "m_slow": "4bit", "v": "4bit"}  # AMCS's states; the format has no name of its own
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}}}

# Name: what goes into the JSON, whether our buckets do, and the class of bitsandbytes where it is one.
CASES: dict[str, tuple[dict[str, Any], bool, str | None]] = {
    "AdamW, DeepSpeed defaults": (ADAMW, False, None),
    "AdamW": (ADAMW, True, None),
    "bitsandbytes AdamW8bit": ({}, True, "AdamW8bit"),
    "bitsandbytes AdEMAMix8bit": ({}, True, "AdEMAMix8bit"),
    "AMCS 8bit, fp32 weights": (ours("AMCS", "8bit", "fp32"), True, None),
    "AMCS fp32, bf16+16": (ours("AMCS", "fp32", "bf16+16"), True, None),
    "AMCS 8bit, bf16+16": (ours("AMCS", "8bit", "bf16+16"), True, None),
    "AMCS 8bit, bf16+8": (ours("AMCS", "8bit", "bf16+8"), True, None),
    "AMCS compact, bf16+4": (ours("AMCS", "compact", "bf16+4"), True, None),
    "AMCS minimal, bf16+4": (ours("AMCS", "minimal", "bf16+4"), True, None),
    "AMCS 4bit, bf16+4": (ours("AMCS", FOUR, "bf16+4"), True, None),
    "AMCS factored, bf16+8": (ours("AMCS", "factored", "bf16+8"), True, None),
    "AMCS lean, bf16": (ours("AMCS", "lean", "bf16"), True, None),
    "AMCS mixed, leanest, bf16": (ours("AMCS", "leanest", "bf16", mode="mixed"), True, None),
    "AMCS single, lean, bf16": (ours("AMCS", "lean", "bf16", mode="single"), True, None),
    "AdamW8 lean, bf16": (ours("AdamW8", "lean", "bf16"), True, None),
    "SOAM 8bit, fp32 weights": (ours("SOAM", "8bit", "fp32"), True, None),
    "SOAM 8bit, bf16+8": (ours("SOAM", "8bit", "bf16+8"), True, None),
    "SOAM compact, bf16+4": (ours("SOAM", "compact", "bf16+4"), True, None),
    "AMCS fp32, bf16+16, released": (ours("AMCS", "fp32", "bf16+16", release_gradients=True), True, None),
    "AMCS 8bit, bf16+16, released": (ours("AMCS", "8bit", "bf16+16", release_gradients=True), True, None),
    "AMCS 8bit, bf16+8, released": (ours("AMCS", "8bit", "bf16+8", release_gradients=True), True, None),
    "AMCS minimal, bf16+4, released": (ours("AMCS", "minimal", "bf16+4", release_gradients=True), True, None),
    "AMCS 4bit, bf16+4, released": (ours("AMCS", FOUR, "bf16+4", release_gradients=True), True, None),
    "AMCS compact, bf16+4, released": (ours("AMCS", "compact", "bf16+4", release_gradients=True), True, None),
    "AMCS factored, bf16+8, released": (ours("AMCS", "factored", "bf16+8", release_gradients=True), True, None),
    "AMCS mixed, leanest, bf16, released": (
        ours("AMCS", "leanest", "bf16", mode="mixed", release_gradients=True),
        True,
        None,
    ),
    "AMCS lean, bf16, released": (ours("AMCS", "lean", "bf16", release_gradients=True), True, None),
    "AdamW8 lean, bf16, released": (ours("AdamW8", "lean", "bf16", release_gradients=True), True, None),
}
# Rules that look at more than single elements; not part of the table.
WHOLE = {
    f"{rule} 8bit, bf16+8, released": (ours(rule, "8bit", "bf16+8", release_gradients=True), True, None)
    for rule in ("Adafactor8", "AdaMuon", "Lamb8", "Muon8", "NorMuon", "SCALE", "SinkGD", "StableAdamW")
}
GOALS = {
    "AMCS 8bit, bf16+8": 8.3,
    "AMCS compact, bf16+4": 7.3,
    "AMCS minimal, bf16+4": 6.8,
    "SOAM 8bit, bf16+8": 7.3,
    "SOAM compact, bf16+4": 6.3,
    "AMCS compact, bf16+4, released": 5.6,
    "AMCS lean, bf16": 5.0,
    "AMCS mixed, leanest, bf16": 5.0,
    "AMCS lean, bf16, released": 4.0,
    "AMCS mixed, leanest, bf16, released": 4.0,
}


def configuration(name: str, stage: int, offload: bool = False) -> dict[str, Any]:
    """The DeepSpeed JSON of a case."""
    extra, buckets, _ = (CASES | WHOLE)[name]
    config = base(stage, buckets) | extra
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        config["zero_force_ds_cpu_optimizer"] = False
    return config


Launcher = Callable[[Path, int, Path, str], tuple[int, str]]
"""Runs a script with one argument on so many ranks: a folder for itself, ranks, script, argument -> status, output."""


def by_deepspeed(folder: Path, world_size: int, script: Path, argument: str) -> tuple[int, str]:
    scripts = Path(sys.executable).parent
    ranks = ["--num_gpus", str(world_size), "--master_port", str(20_000 + os.getpid() % 20_000)]
    command = [sys.executable, str(scripts / "deepspeed"), *ranks, str(script), argument]
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout[-3000:] + done.stderr[-5000:]


def launch(
    config: dict[str, Any], world_size: int, launcher: Launcher = by_deepspeed, **settings: Any
) -> list[dict[str, Any]]:
    """What each rank of a real run held, in bytes; `settings` as of memory_worker.py, which see."""
    defaults = {"optimizer": None, "steps": 4, "micro_batch": 1, "activations": "full", "loss": "plain", "chat": False}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps(defaults | settings | {"config": config, "out": folder}))
        status, printed = launcher(Path(folder), world_size, WORKER, str(path))
        if status:
            raise SystemExit(f"{config}, {world_size} rank(s):\n{printed}")
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def predict(config: dict[str, Any], world_size: int, model: str) -> int:
    """The peak that `toolkit estimate` would give."""
    from toolkit.estimate.predict import Case, Estimator
    from toolkit.records.activations import Activations

    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(model, config, world_size, 1, TOKENS, device=device, activations=Activations(), loss="plain")
    return Estimator().peak(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stages", type=int, nargs="+", default=[2])
    parser.add_argument("--model", default="qwen3-134m")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES | WHOLE)
    parser.add_argument(
        "--offload", action="store_true", help="optimizer state and step on the host, which a CPU counts too"
    )
    options = parser.parse_args()
    columns = ("forward", "backward", "step", "resident")
    print(f"{options.model}, bytes per parameter on the largest of {options.ranks} rank(s)")
    print(
        f"{'':34}{'stage':>6}{'peak':>8}{'predicted':>11}{'error':>8}{'goal':>6}"
        + "".join(f"{column:>10}" for column in columns)
    )
    for name in options.cases:
        for stage in options.stages:
            config, bnb = configuration(name, stage, options.offload), (CASES | WHOLE)[name][2]
            ranks = launch(config, options.ranks, model=options.model, optimizer=bnb, seq_len=TOKENS)
            largest = max(ranks, key=lambda found: found["peak"])
            parameters = largest["parameters"]
            shares = {key: largest.get(key, float("nan")) / parameters for key in ("peak", *columns)}
            goal = (
                f"{GOALS[name]:6.1f}"
                if name in GOALS and (options.ranks, stage, options.model) == (1, 2, "qwen3-134m")
                else f"{'':6}"
            )
            beside = f"{'':19}"
            if bnb is None:
                predicted = predict(config, options.ranks, options.model) / parameters
                beside = f"{predicted:11.2f}{100 * (predicted / shares['peak'] - 1):+7.1f}%"
            shown = "".join(f"{shares[column]:10.2f}" for column in columns)
            print(f"{name:34}{stage:6}{shares['peak']:8.2f}{beside}{goal}{shown}", flush=True)


if __name__ == "__main__":
    main()
