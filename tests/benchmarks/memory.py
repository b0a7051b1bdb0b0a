"""Peak memory of whole training steps, by optimizer, format, ZeRO stage and number of ranks.

    python tests/benchmarks/memory.py                       # one rank, stage 2: the table of docs/benchmarks
    python tests/benchmarks/memory.py --ranks 2 --stages 1 2 3

Every allocation of a real `deepspeed` run on CPU ranks is counted by torch's profiler, from before the model exists;
on a GPU the caching allocator's peak is taken. With 8 tokens a step activations vanish and what is left is model
state: weights, remainders, gradients, optimizer state, buckets and transients. "predicted" is `docs/memory-model.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

BUCKET = 4_194_304
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


def ours(rule: str, state_format: str, weights: str, **extra: Any) -> dict[str, Any]:
    params = {"lr": 1e-4, "state_format": state_format, "weights": weights} | extra
    return {"optimizer": {"type": rule, "params": params}}


ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}}}

# Name: what goes into the JSON, whether our buckets do, and the class of bitsandbytes where it is one.
CASES: dict[str, tuple[dict[str, Any], bool, str | None]] = {
    "AdamW, DeepSpeed defaults": (ADAMW, False, None),
    "AdamW": (ADAMW, True, None),
    "bitsandbytes AdamW8bit": ({}, True, "AdamW8bit"),
    "bitsandbytes AdEMAMix8bit": ({}, True, "AdEMAMix8bit"),
    "AMCS 8bit, fp32 weights": (ours("AMCS", "8bit", "fp32"), True, None),
    "AMCS 8bit, bf16+16": (ours("AMCS", "8bit", "bf16+16"), True, None),
    "AMCS 8bit, bf16+8": (ours("AMCS", "8bit", "bf16+8"), True, None),
    "AMCS compact, bf16+4": (ours("AMCS", "compact", "bf16+4"), True, None),
    "AMCS minimal, bf16+4": (ours("AMCS", "minimal", "bf16+4"), True, None),
    "SOAM 8bit, bf16+8": (ours("SOAM", "8bit", "bf16+8"), True, None),
    "SOAM compact, bf16+4": (ours("SOAM", "compact", "bf16+4"), True, None),
    "AMCS compact, bf16+4, released": (ours("AMCS", "compact", "bf16+4", release_gradients=True), True, None),
}
GOALS = {
    "AMCS 8bit, bf16+8": 8.3,
    "AMCS compact, bf16+4": 7.3,
    "AMCS minimal, bf16+4": 6.8,
    "SOAM 8bit, bf16+8": 7.3,
    "SOAM compact, bf16+4": 6.3,
    "AMCS compact, bf16+4, released": 5.6,
}


def run(name: str, stage: int, world_size: int, model: str, offload: bool) -> list[dict[str, float]]:
    """Bytes that each rank of a real run held, by phase."""
    extra, buckets, bnb = CASES[name]
    config = base(stage, buckets) | extra
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        config["zero_force_ds_cpu_optimizer"] = False
    with tempfile.TemporaryDirectory() as folder:
        settings = {"config": config, "optimizer": bnb, "model": model, "steps": 4, "tokens": 8, "out": folder}
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps(settings))
        scripts = Path(sys.executable).parent
        port = str(20_000 + os.getpid() % 20_000)
        command = [
            str(scripts / "deepspeed"),
            "--num_gpus",
            str(world_size),
            "--master_port",
            port,
            str(WORKER),
            str(path),
        ]
        environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(
                f"{name}, stage {stage}, {world_size} rank(s):\n{done.stdout[-3000:]}{done.stderr[-5000:]}"
            )
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def predict(name: str, stage: int, world_size: int, model: str) -> float | None:
    """Bytes per parameter that docs/memory-model.md gives; None for what it does not describe."""
    from toolkit.memory import Buckets, peak, per_parameter
    from toolkit.models import load_config
    from toolkit.models.build import skeleton
    from toolkit.optim import find_rule
    from toolkit.optim.layout import layout, state_formats

    extra, _, _ = CASES[name]
    optimizer = extra.get("optimizer", {})
    rule, params = find_rule(optimizer.get("type")), optimizer.get("params", {})
    if rule is None or params["weights"] == "fp32":
        return None
    formats = state_formats(rule.rule, params["state_format"], where=name)
    matrix = layout(rule.rule, formats, params["weights"], torch.bfloat16)
    vector = layout(rule.rule, dict.fromkeys(formats, "fp32"), "bf16+16", torch.bfloat16)
    shapes = [tuple(p.shape) for p in skeleton(load_config(model)[0], torch.bfloat16).parameters()]
    buckets = Buckets(BUCKET, prefetch=BUCKET, live=4 * BUCKET)
    held = peak(
        shapes,
        matrix,
        vector,
        stage=stage,
        world_size=world_size,
        buckets=buckets,
        released=params.get("release_gradients", False),
    )
    return per_parameter(held, shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stages", type=int, nargs="+", default=[2])
    parser.add_argument("--model", default="qwen3-134m")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
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
            ranks = run(name, stage, options.ranks, options.model, options.offload)
            largest = max(ranks, key=lambda found: found["peak"])
            shares = {key: value / largest["parameters"] for key, value in largest.items()}
            goal = (
                f"{GOALS[name]:6.1f}"
                if name in GOALS and (options.ranks, stage, options.model) == (1, 2, "qwen3-134m")
                else f"{'':6}"
            )
            predicted = None if options.offload else predict(name, stage, options.ranks, options.model)
            beside = f"{'':19}"
            if predicted is not None:
                beside = f"{predicted:11.2f}{100 * (predicted / shares['peak'] - 1):+7.1f}%"
            shown = "".join(f"{shares.get(column, float('nan')):10.2f}" for column in columns)
            print(f"{name:34}{stage:6}{shares['peak']:8.2f}{beside}{goal}{shown}", flush=True)


if __name__ == "__main__":
    main()
