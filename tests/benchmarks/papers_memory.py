"""Where the memory of the papers' runs goes: Qwen3-134M, batches of 128 sequences, one GPU.

    python tests/benchmarks/papers_memory.py              # predictions for a GPU; nothing runs
    python tests/benchmarks/papers_memory.py --measure    # real steps on a CPU, of fewer tokens, beside predictions

AdamW under DeepSpeed's defaults (a JSON of bf16, stage 2 and the optimizer) beside the shipped configurations
`amcs_zero2` and `soam_zero2`, with the same model, batch, loss and checkpointing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from memory import configuration, launch

from toolkit import config as configs
from toolkit.estimate.predict import Case, Estimator
from toolkit.records import categories as c
from toolkit.records.activations import Activations

MODEL = "qwen3-134m"
BATCH = 128
LENGTHS = (64, 128, 256, 512, 1024, 2048)
MICRO_BATCHES = (128, 32, 8, 2, 1)
PASSES = (("plain", "full"), ("plain", "checkpoint"), ("chunked", "full"), ("chunked", "checkpoint"))
"""Loss, and what is kept of activations."""
MEASURED = ((1, 8, 1, "plain", "full"), *((4, 256, 2, loss, activations) for loss, activations in PASSES))
"""Micro-batch, sequence length, accumulation, loss, activations."""
PAPERS = {"Muon": 28.7, "AdamW": 31.5, "SOAM": 39.5, "AMCS": 41.8}
"""GB."""
GROUPS = ("weights", "gradients", "state", "activations", "logits", "transients")
ADAMW = "AdamW, DeepSpeed's defaults"


def optimizers(micro_batch: int, accumulation: int) -> dict[str, dict[str, Any]]:
    """The DeepSpeed JSONs that are compared."""
    batch = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}
    shipped = {name: configs.load_config(f"{name.lower()}_zero2") for name in ("AMCS", "SOAM")}
    return {
        name: dict(one) | batch
        for name, one in {ADAMW: configuration("AdamW, DeepSpeed defaults", 2), **shipped}.items()
    }


def grouped(held: Mapping[str, int]) -> dict[str, float]:
    """GB of what is held, in GROUPS: master weights and remainders are weights, buckets transients."""
    sums = dict.fromkeys(GROUPS, 0.0)
    for name, size in held.items():
        if name in (c.WEIGHTS, c.MASTER, c.REMAINDER):
            group = "weights"
        elif name in (c.GRADIENTS, c.ACTIVATIONS, c.LOGITS):
            group = name
        else:
            group = "transients" if not c.is_model_state(name) else "state"
        sums[group] += size / 1e9
    return sums


def case(
    config: Mapping[str, Any],
    micro_batch: int,
    seq_len: int,
    accumulation: int,
    loss: str,
    activations: str,
    device: str,
) -> Case:
    return Case(
        MODEL,
        config,
        1,
        micro_batch,
        seq_len,
        accumulation,
        device,
        activations=Activations.read(activations),
        loss=loss,
    )


def cells(values: Mapping[str, float]) -> str:
    return " | ".join(f"{value:.2f}" for value in values.values())


def predictions() -> None:
    estimator = Estimator()
    print(f"one pass over the whole batch of {BATCH}, GB of an AdamW step at its peak\n")
    print(f"| loss | activations | tokens | peak | {' | '.join(GROUPS)} | AMCS | SOAM |")
    for loss, activations in PASSES:
        peaks = {}
        for seq_len in LENGTHS:
            row = {
                name: estimator.predict(case(config, BATCH, seq_len, 1, loss, activations, "cuda"))
                for name, config in optimizers(BATCH, 1).items()
            }
            peaks[seq_len] = row[ADAMW].peak
            sizes = cells(grouped(row[ADAMW].at_peak()))
            others = " | ".join(f"{row[name].peak / 1e9:.2f}" for name in ("AMCS", "SOAM"))
            print(
                f"| {loss} | {activations} | {seq_len} | {row[ADAMW].peak / 1e9:.2f} | {sizes} | {others} |",
                flush=True,
            )
        per_token = (peaks[2048] - peaks[1024]) / (BATCH * 1024)
        fixed = peaks[2048] - per_token * BATCH * 2048
        fitting = ", ".join(f"{name} {(gb * 1e9 - fixed) / per_token / BATCH:.0f}" for name, gb in PAPERS.items())
        print(f"  {per_token / 1e3:.0f} kB a token; the papers' figures are reached at a length of: {fitting}")
    print(
        f"\na batch of {BATCH} in micro-batches: GB of AdamW, AMCS, SOAM, and the share of AMCS and SOAM in AdamW's\n"
    )
    for loss, activations in PASSES:
        for seq_len in LENGTHS[2:]:
            for micro_batch in MICRO_BATCHES:
                accumulation = BATCH // micro_batch
                found = [
                    estimator.peak(case(config, micro_batch, seq_len, accumulation, loss, activations, "cuda")) / 1e9
                    for config in optimizers(micro_batch, accumulation).values()
                ]
                shares = " | ".join(f"{one / found[0]:.2f}" for one in found[1:])
                sizes = " | ".join(f"{one:.2f}" for one in found)
                print(f"| {loss} | {activations} | {seq_len} | {micro_batch} | {sizes} | {shares} |", flush=True)


def measurements() -> None:
    estimator = Estimator()
    print(f"| | loss | activations | tokens | measured | predicted | share of AdamW's | {' | '.join(GROUPS)} |")
    for micro_batch, seq_len, accumulation, loss, activations in MEASURED:
        first = None
        for name, config in optimizers(micro_batch, accumulation).items():
            settings = {"micro_batch": micro_batch, "seq_len": seq_len, "loss": loss, "activations": activations}
            [found] = launch(config, 1, model=MODEL, steps=3, **settings)
            predicted = estimator.peak(case(config, micro_batch, seq_len, accumulation, loss, activations, "cpu"))
            first = first or found["peak"]
            print(
                f"| {name} | {loss} | {activations} | {accumulation} x {micro_batch} x {seq_len} | "
                f"{found['peak'] / 1e9:.2f} | {predicted / 1e9:.2f} | {found['peak'] / first:.2f} | "
                f"{cells(grouped(found['held']))} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    measurements() if parser.parse_args().measure else predictions()
