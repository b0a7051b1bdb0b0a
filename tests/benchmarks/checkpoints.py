"""Saving Qwen3-134M: seconds that training waits, seconds until it is on the disk, bytes a parameter.

    deepspeed --num_gpus 1 tests/benchmarks/checkpoints.py [--model qwen3-134m] [--steps 4] [--folder FOLDER]

AMCS as shipped through this package's saver, then DeepSpeed's AdamW through DeepSpeed's `save_checkpoint`, in one run,
after a few steps on Python's source (codes of fresh state would be squeezed to nothing). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from toolkit.run import ranks, training
from toolkit.run.settings import parse


def trained(config: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """A prepared run and its engine after `options.steps` steps."""
    from toolkit import data
    from toolkit.run.prepare import prepare

    line = f"--model {options.model} --config {config} --steps {options.steps} --seq-len 64 --micro-batch 2 "
    settings = parse((line + "--eval-every 0 --warmup 1").split())
    assert settings is not None
    prepared = prepare(settings)
    engine = training.build_engine(prepared)
    batches = data.rank_batches(prepared.data, rank=ranks.rank(), world_size=ranks.world_size(), micro_batch=2)
    for _ in range(options.steps):
        training.optimizer_step(engine, batches, 1)
    batches.close()
    return prepared, engine


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.pt"))


def main() -> None:
    ranks.prepare_environment()
    ranks.start()
    from toolkit.checkpoint.store import Store
    from toolkit.run.saving import Saver

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen3-134m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--local_rank")
    options = parser.parse_args()
    folder = Path(ranks.from_first(tempfile.mkdtemp(dir=options.folder)))
    result: dict[str, Any] = {"model": options.model, "ranks": ranks.world_size(), "steps": options.steps}

    prepared, engine = trained("amcs_zero2", options)
    saver = Saver(engine, Store(folder / "amcs"))
    rows = []
    for step in range(1, 4):  # the first one touches its memory for the first time
        began = time.perf_counter()
        waited = saver.start(step, {})
        assert saver.wait() is None
        rows.append({"waits_s": waited, "on_disk_s": time.perf_counter() - began})
    saver.close()
    held = size(folder / "amcs" / "global_step3")
    result["amcs"] = {"saves": rows, "bytes": held, "bytes_per_parameter": held / prepared.parameters}
    engine.destroy()
    del engine, saver
    gc.collect()

    prepared, engine = trained("adamw_zero2", options)
    began = time.perf_counter()
    engine.save_checkpoint(str(folder / "adamw"))
    result["adamw"] = {"waits_s": time.perf_counter() - began, "bytes": size(folder / "adamw")}
    result["adamw"]["bytes_per_parameter"] = result["adamw"]["bytes"] / prepared.parameters
    if ranks.rank() == 0:
        shutil.rmtree(folder)
        print(json.dumps(result, indent=1))
    ranks.finish()


if __name__ == "__main__":
    main()
