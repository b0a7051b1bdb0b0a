"""Predicted against measured peaks: optimizers, ZeRO stages, ranks, state formats, models, lengths, activations.

    python tests/benchmarks/prediction.py                   # the table of docs/benchmarks, about 25 minutes
    python tests/benchmarks/prediction.py --only qwen3-tiny --keep measured.json    # measured once, predicted each time

Each case is a real `deepspeed` run on CPU ranks (on GPUs where there are any), of which one whole step is traced; the
prediction is what `toolkit estimate --device cpu` computes from the same JSON before anything runs. "model state" is
weights, remainder or master weights, gradients and optimizer state at the measured peak.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from memory import configuration, launch

from toolkit.estimate.predict import Case, Estimator
from toolkit.records.activations import Activations
from toolkit.records.categories import is_model_state

LIMIT, STATE_LIMIT = 0.05, 0.02


@dataclass(frozen=True)
class Run:
    """One row."""

    model: str
    optimizer: str
    stage: int
    ranks: int
    micro_batch: int
    seq_len: int
    activations: str
    loss: str = "plain"
    accumulation: int = 1


def cases() -> list[Run]:
    """Every stage and number of ranks with every optimizer on the small model, then the 134M one."""
    found = []
    for optimizer, stage, ranks in itertools.product(("AMCS 8bit", "SOAM 8bit", "AdamW"), (0, 1, 2, 3), (1, 2)):
        suffix = {"AdamW": ""}.get(optimizer, ", fp32 weights" if stage == 0 else ", bf16+8")
        found.append(Run("qwen3-tiny", optimizer + suffix, stage, ranks, 2, 256, "full"))
    for stage, ranks, seq_len, activations in (
        (2, 1, 64, "full"),
        (2, 1, 256, "checkpoint"),
        (3, 2, 64, "checkpoint"),
        (2, 2, 256, "checkpoint"),
        (1, 2, 64, "full"),
    ):
        for optimizer in ("AMCS compact, bf16+4", "SOAM compact, bf16+4", "AMCS minimal, bf16+4"):
            found.append(Run("qwen3-tiny", optimizer, stage, ranks, 2, seq_len, activations))
    for optimizer, stage, ranks, micro_batch, seq_len, activations, loss in (
        ("AMCS 8bit, bf16+8", 2, 1, 2, 256, "checkpoint:2", "plain"),
        ("AMCS 8bit, bf16+8", 2, 1, 2, 64, "checkpoint:3,tiled", "plain"),
        ("AMCS 8bit, bf16+8", 3, 2, 2, 64, "checkpoint,tiled", "chunked"),
        ("AMCS 8bit, bf16+8", 2, 2, 2, 64, "tiled", "chunked"),
        ("AMCS lean, bf16, released", 2, 1, 9, 512, "checkpoint,tiled", "chunked"),  # two tiles
    ):
        found.append(Run("qwen3-tiny", optimizer, stage, ranks, micro_batch, seq_len, activations, loss))
    for optimizer, stage, ranks in (("AMCS 8bit, bf16+8", 2, 2), ("AMCS 8bit, bf16+8", 1, 2), ("AdamW", 2, 2)):
        found.append(Run("qwen3-tiny", optimizer, stage, ranks, 2, 64, "full", accumulation=2))
    for optimizer, stage, ranks, seq_len, activations, loss in (
        ("AMCS 8bit, bf16+8", 2, 1, 256, "full", "plain"),
        ("AMCS 8bit, bf16+8", 2, 1, 64, "checkpoint", "plain"),
        ("AMCS 8bit, bf16+8", 2, 2, 256, "full", "plain"),
        ("AMCS 8bit, bf16+8", 3, 2, 256, "checkpoint", "plain"),
        ("AMCS 8bit, bf16+8", 2, 1, 256, "checkpoint", "chunked"),
        ("AMCS compact, bf16+4, released", 2, 1, 64, "checkpoint", "plain"),
        ("SOAM 8bit, bf16+8", 1, 2, 256, "checkpoint", "plain"),
        ("SOAM compact, bf16+4", 3, 2, 64, "full", "plain"),
        ("AdamW", 2, 1, 256, "full", "plain"),
        ("AdamW", 2, 2, 256, "checkpoint", "plain"),
        ("AdamW", 3, 2, 256, "full", "plain"),
        ("AdamW", 0, 1, 64, "checkpoint", "plain"),
    ):
        found.append(Run("qwen3-134m", optimizer, stage, ranks, 2, seq_len, activations, loss))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose model or optimizer contains this")
    parser.add_argument("--keep", type=Path, help="file of measurements: what is in it is not measured again")
    options = parser.parse_args()
    kept = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    estimator = Estimator()
    header = (
        "model",
        "optimizer",
        "stage",
        "ranks",
        "tokens",
        "activations",
        "loss",
        "measured MB",
        "predicted MB",
        "error",
    )
    print("| " + " | ".join((*header, "model state", "peak in")) + " |")
    print("|" + "---|" * (len(header) + 2), flush=True)
    errors = []
    for run in cases():
        if options.only and options.only not in run.model and options.only not in run.optimizer:
            continue
        config = configuration(run.optimizer, run.stage)
        config["train_micro_batch_size_per_gpu"] = run.micro_batch
        config["gradient_accumulation_steps"] = run.accumulation
        shape = {"micro_batch": run.micro_batch, "seq_len": run.seq_len}
        key = str(run)
        if key not in kept:
            settings = {"activations": run.activations, "loss": run.loss} | shape
            kept[key] = launch(config, run.ranks, model=run.model, steps=3, **settings)
            if options.keep:
                options.keep.write_text(json.dumps(kept, indent=1))
        ranks = kept[key]
        largest = max(ranks, key=lambda found: found["peak"])
        predicted = estimator.predict(
            Case(
                run.model,
                config,
                run.ranks,
                **shape,
                device=device,
                activations=Activations.read(run.activations),
                loss=run.loss,
                accumulation=run.accumulation,
            )
        )
        held = next(phase.held for phase in predicted.phases if phase.name == largest["phase"])
        state = sum(size for name, size in largest["held"].items() if is_model_state(name))
        said = sum(size for name, size in held.items() if is_model_state(name))
        error, state_error = predicted.peak / largest["peak"] - 1, said / state - 1
        errors.append((abs(error), abs(state_error)))
        cells = (
            *(
                run.model,
                run.optimizer,
                run.stage,
                run.ranks,
                f"{run.accumulation} x {run.micro_batch} x {run.seq_len}",
            ),
            *(run.activations, run.loss),
            *(f"{largest['peak'] / 1e6:.1f}", f"{predicted.peak / 1e6:.1f}", f"{100 * error:+.1f} %"),
            *(f"{100 * state_error:+.1f} %", largest["phase"]),
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    beyond = sum(error > LIMIT or state > STATE_LIMIT for error, state in errors)
    worst = max(error for error, _ in errors)
    worst_state = max(state for _, state in errors)
    print(f"\n{len(errors)} cases; largest error {100 * worst:.1f} %, of model state {100 * worst_state:.1f} %")
    if beyond:
        raise SystemExit(f"{beyond} case(s) beyond {LIMIT:.0%}, or {STATE_LIMIT:.0%} of model state")


if __name__ == "__main__":
    main()
