"""What a change of structure must not change: losses, checkpoints and predictions, written down and compared.

    python tests/benchmarks/unchanged.py --out before.json       # about five minutes on two cores
    python tests/benchmarks/unchanged.py --out after.json --compare before.json

* losses: 50 steps of qwen3-tiny on two ranks at ZeRO stages 1, 2 and 3, as metrics.jsonl has them;
* checkpoints: the SHA-256 of every tensor in the checkpoint after those steps;
* predictions: all that `toolkit estimate` says of the cases of prediction.py.

Only commands are used, so the same file measures an older version: `PYTHONPATH=<its checkout> python unchanged.py ...`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from memory import configuration

STEPS = 50
STAGES = (1, 2, 3)


def train(stage: int, folder: Path) -> tuple[list[float], dict[str, str]]:
    """The losses of a run at `stage`, and the digests of its last checkpoint."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "toolkit.train"]
    arguments = ["--config", f"amcs_zero{stage}", "--steps", str(STEPS), "--seq-len", "64", "--global-batch", "4"]
    arguments += ["--eval-every", "0", "--memory-profile", "off", "--save-every", str(STEPS), "--run-dir", str(folder)]
    with open(folder.with_suffix(".log"), "w") as log:
        subprocess.run([*launcher, *arguments], check=True, stdout=log, stderr=log, env=os.environ)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    checkpoint = folder / "checkpoints" / f"global_step{STEPS}"
    digests = {}
    for path in sorted(checkpoint.rglob("*.pt")):
        content = torch.load(path, map_location="cpu", weights_only=True)
        # Generators that no seed sets (numpy's) differ from run to run.
        found = {key: value for key, value in tensors(content) if "/random/numpy" not in key}
        digests |= {f"{path.relative_to(checkpoint)}{key}": value for key, value in found.items()}
    return [json.loads(line)["loss"] for line in lines], digests


def tensors(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Place and digest of every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        about = f"{value.dtype} {list(value.shape)} ".encode()
        yield where, hashlib.sha256(about + raw).hexdigest()[:16]
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{where}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{where}/{index}")


def predictions(folder: Path) -> dict[str, Any]:
    """All that `toolkit estimate --json` says, by case."""
    from prediction import cases
    from typer.testing import CliRunner

    from toolkit.cli import app

    found = {}
    for run in cases():
        path = folder / "config.json"
        config = configuration(run.optimizer, run.stage)
        # The batch is the run's.
        config.pop("train_micro_batch_size_per_gpu", None)
        path.write_text(json.dumps(config))
        arguments = ["estimate", "--model", run.model, "--config", str(path), "--ranks", str(run.ranks), "--json"]
        arguments += ["--micro-batch", str(run.micro_batch), "--grad-accum", str(run.accumulation)]
        arguments += ["--seq-len", str(run.seq_len), "--loss", run.loss, "--device", "cpu"]
        arguments += ["--activations", run.activations]
        result = CliRunner().invoke(app, arguments)
        if result.exit_code:
            raise SystemExit(f"{run}: {result.output}{result.exception!r}")
        found[str(run)] = json.loads(result.stdout)
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, one line for each."""
    found = []
    for part in before:
        for key in sorted({*before[part], *after[part]}):
            old, new = before[part].get(key), after[part].get(key)
            if old != new:
                found.append(f"{part} {key}: {str(old)[:60]} is now {str(new)[:60]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--compare", type=Path, help="file that an earlier call wrote; exit status 1 if they differ")
    options = parser.parse_args()
    found: dict[str, Any] = {"losses": {}, "checkpoints": {}, "predictions": {}}
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            losses, digests = train(stage, Path(folder) / f"stage{stage}")
            found["losses"][str(stage)] = losses
            found["checkpoints"] |= {f"{stage}/{place}": digest for place, digest in digests.items()}
        found["predictions"] = predictions(Path(folder))
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    sizes = ", ".join(f"{len(value)} {part}" for part, value in found.items())
    print(f"{options.out}: {sizes}")
    if options.compare:
        differences = compare(json.loads(options.compare.read_text()), found)
        print("\n".join(differences) or f"identical to {options.compare}")
        raise SystemExit(1 if differences else 0)


if __name__ == "__main__":
    main()
