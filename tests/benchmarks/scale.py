"""Memory, collectives and time of a step from one GPU to 1,024, as docs/scale.md has them: all of it predicted.

python tests/benchmarks/scale.py                        # writes docs/scale.md
python tests/benchmarks/scale.py --measure scale.json   # measures the memory of CPU ranks too, and keeps that
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory import launch

from toolkit.config import load_config as deepspeed_config
from toolkit.estimate.predict import Case, Estimator, assumed_context
from toolkit.models import flops_per_token, load_config
from toolkit.records.activations import Activations
from toolkit.records.categories import model_state
from toolkit.records.memory import Prediction
from toolkit.records.sizes import size_text
from toolkit.zero.wire import ALL_REDUCE

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
MODELS = ("qwen3-134m", "qwen3-1.7b", "llama3-8b", "qwen3-30b-a3b", "llama3-70b")
RANKS = (1, 8, 64, 512, 1024)
STAGES = (2, 3)
SEQ_LEN, MICRO = 4096, 1

PEAK = 989.4e12
"""Dense bf16 operations a second: H100 SXM's data sheet."""
REACHED = 0.4
"""Share of `PEAK` that passes reach."""
NODE = 8
INSIDE, BETWEEN = 300e9, 40e9
"""Bytes a second that a GPU sends: to those of its node (NVLink), and to others (one 400 Gbit/s card for each GPU)."""
MEMORY = 3.35e12
"""Bytes a second of the GPU's memory, for the optimizer's step."""
RECOMPUTED = 4 / 3
"""Activation checkpointing: one more forward pass."""

MEASURED = tuple((stage, ranks) for stage in STAGES for ranks in (1, 2, 3, 4))

TEXT = """# Large runs

What a rank holds, what it puts into collectives and how long a step takes, for models of 134M to 70B parameters on one
GPU to 1,024. **Everything in these tables is predicted**, by

    python tests/benchmarks/scale.py

from `toolkit.estimate`; nothing of it was measured on a GPU. What could be checked on CPU ranks was: memory
([below](#checked)), and the bytes of collectives at stages 1, 2 and 3, which a test counts in real steps of two ranks
(`tests/distributed/test_collectives.py`). `toolkit estimate --ranks 8 --nodes 128` says the same of any other case, and
`summary.json` of a run has what it counted (`collective_bytes`).

## Assumptions

* AMCS, 8-bit state, bf16+8 weights; {micro} sequence of {seq_len:,} tokens a rank and step, no accumulation,
  activations checkpointed, chunked loss.
* Memory: the peak of the rank that holds most, and {context} for CUDA's context and NCCL.
* Compute: `flops_per_token` x {recomputed:.2f} for checkpointing, at {reached:.0%} of {peak:.0f} TFLOP/s (H100, bf16).
* Collectives: a ring sends (N - 1) / N of a gathered or reduced tensor from each rank, at {inside:.0f} GB/s within a
  node of {node} GPUs and {between:.0f} GB/s beyond; no latency, no contention. At 1,024 ranks both will be felt.
* The optimizer's step reads and writes this rank's weights and state once, at {memory:.2f} TB/s.
* `step`: from all communication hidden behind compute, to none of it.

## Reducing gradients at stages 1 and 2

A bucket of S bytes is reduced by one `reduce` to each of the k ranks that own parts of it, all in one NCCL group
(`toolkit/zero/gradients.py`). Would one `reduce_scatter` be cheaper? By NCCL's model of a ring of N ranks, with
latency a of a hop and bandwidth B of a link, **a prediction that nobody has measured**:

| | latency | bandwidth |
|---|---|---|
| one `reduce_scatter` | (N - 1) a | (N - 1) / N x S / B |
| k `reduce`s | from (N - 1) a, all of the group at the same time, to k (N - 1) a, one after the other | S / B |

The bytes are the same but for 1 / N, so it is a matter of latency: a `reduce_scatter` saves at most (k - 1)(N - 1) a
a bucket, and nothing where k is 1. It hands out equal parts, though, and a bucket's owners have unequal ones: filled
up to the largest part it is N times that part, which for k far below N is more than S by N / k. So it is cheaper only
where a bucket has nearly as many owners as there are ranks and latency counts: small models on many ranks. Owners of
a bucket are about its share of the model times N (and one or two more for each parameter group): with "auto", a
sixteenth of the model up to 1.07B parameters, N / 16 of them. Of llama3-70b on 1,024 GPUs a bucket is a thousandth of
the model and k one or two. For qwen3-134m there, k is about 64 and with a = 5 us (assumed) the `reduce`s of a bucket
take 5 ms to 0.33 s. `reduce_scatter` would have to send 16 times the bytes, 7 ms at 40 GB/s beside the same 5 ms:
cheaper unless the group overlaps most of its `reduce`s, as it is meant to.

## Predicted

What takes more than 80 GB is left out.

{table}

Stage 2 keeps all weights on every rank, so more ranks save optimizer state and gradients only: the memory of a rank
tends to 2 bytes a parameter plus activations. At stage 3 weights are gathered for the forward pass and again for the
backward pass, which is half more to send.
"""

CHECKS = """
## Checked

Peaks of `qwen3-tiny` on CPU ranks, {micro_batch} sequences of {seq_len} tokens, every allocation counted
(`python tests/benchmarks/scale.py --measure FILE`, {versions}; 2 cores):

{checked}

[More of them](benchmarks/README.md), 1 and 2 ranks. What each rank owns of a bucket is joined before it is reduced: on
a CPU two of these pieces are held at a time beside a rank's own, with NCCL all of them, which was not measured.

How such jobs are cut and resharded is tested without starting them: partitions, block grid and manifest of
Llama-3-shaped 8B and 70B at 64, 512 and 1,024 ranks, and a checkpoint of 1,024 ranks read by 64
(`tests/unit/test_scale.py`); DeepSpeed's own layout of 1,024 ranks is compared with that plan.
"""


def case(model: str, stage: int, ranks: int) -> Case:
    return Case(
        *(model, deepspeed_config(f"amcs_zero{stage}"), ranks, MICRO, SEQ_LEN),
        activations=Activations(checkpoint=True),
        loss="chunked",
    )


def seconds(model: str, ranks: int, found: Prediction) -> tuple[float, float]:
    """Of a step: with all communication hidden, and with none."""
    compute = flops_per_token(load_config(model)[0], SEQ_LEN) * RECOMPUTED * SEQ_LEN * MICRO / (PEAK * REACHED)
    sent = sum(size * (2 if kind == ALL_REDUCE else 1) for kind, size in (found.wire or {}).items())
    wire = sent * (ranks - 1) / ranks / (INSIDE if ranks <= NODE else BETWEEN)
    others = 2 * found.setup.parameters * (1 - 1 / ranks) if found.setup.stage < 3 else 0  # weights of other ranks
    step = 2 * (model_state(found.resident) - others) / MEMORY
    return max(compute, wire) + step, compute + wire + step


def about(tokens: float) -> str:
    """Three digits: no prediction is better than that."""
    return f"{float(f'{tokens:.3g}'):,.0f}"


def rows(estimator: Estimator) -> Iterator[str]:
    columns = ("model", "stage", "GPUs", "memory of a rank", "a step's collectives", "step", "tokens/s")
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for model in MODELS:
        for stage in STAGES:
            for ranks in RANKS:
                found = estimator.predict(case(model, stage, ranks))
                memory = found.needed / 1e9
                if memory > 80:
                    continue
                least, most = seconds(model, ranks, found)
                tokens = SEQ_LEN * MICRO * ranks
                sent = sum((found.wire or {}).values()) / 1e9
                cells: tuple[Any, ...] = (
                    *(model, stage, f"{ranks:,}", f"{memory:.1f} GB", f"{sent:.2f} GB" if sent else "none"),
                    f"{least:.3f} s" if ranks == 1 else f"{least:.3f} to {most:.3f} s",
                    about(tokens / least) if ranks == 1 else f"{about(tokens / most)} to {about(tokens / least)}",
                )
                yield "| " + " | ".join(map(str, cells)) + " |"


SHAPE = {"micro_batch": 2, "seq_len": 128}


def small_config(stage: int) -> dict[str, Any]:
    return deepspeed_config(f"amcs_zero{stage}") | {"train_micro_batch_size_per_gpu": SHAPE["micro_batch"]}


def measure() -> list[dict[str, Any]]:
    """Peaks of real ranks."""
    import deepspeed
    import torch

    found = []
    for stage, ranks in MEASURED:
        held = launch(
            small_config(stage), ranks, model="qwen3-tiny", steps=3, activations="checkpoint", loss="chunked", **SHAPE
        )
        found.append({"stage": stage, "ranks": ranks, "peak": max(one["peak"] for one in held)})
    versions = f"torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, seed 0"
    return [one | {"versions": versions} for one in found]


def checked(estimator: Estimator, measured: list[dict[str, Any]]) -> Iterator[str]:
    yield "| stage | ranks | predicted | measured | error |"
    yield "|---|---|---|---|---|"
    for one in measured:
        stage, ranks = one["stage"], one["ranks"]
        small = {"device": "cpu", "activations": Activations(checkpoint=True), "loss": "chunked"}
        peak = estimator.predict(Case("qwen3-tiny", small_config(stage), ranks, **SHAPE, **small)).peak
        error = 100 * (peak / one["peak"] - 1)
        yield f"| {stage} | {ranks} | {peak / 1e6:.2f} MB | {one['peak'] / 1e6:.2f} MB | {error:+.2f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="of measurements, made where it is not there")
    options = parser.parse_args()
    estimator = Estimator()
    if options.measure:
        if not options.measure.exists():
            options.measure.write_text(json.dumps(measure(), indent=1))
        measured = json.loads(options.measure.read_text())
        table = "\n".join(checked(estimator, measured))
        checks = CHECKS.format(checked=table, versions=measured[0]["versions"], **SHAPE)
    else:  # stays as it was measured
        checks = "\n## Checked\n" + PAGE.read_text(encoding="utf-8").split("\n## Checked\n")[1]
    assumed = {"micro": MICRO, "seq_len": SEQ_LEN, "recomputed": RECOMPUTED, "reached": REACHED, "node": NODE}
    assumed |= {"peak": PEAK / 1e12, "inside": INSIDE / 1e9, "between": BETWEEN / 1e9, "memory": MEMORY / 1e12}
    contexts = f"{size_text(assumed_context(1))} to {size_text(assumed_context(max(RANKS)))}"
    page = TEXT.format(table="\n".join(rows(estimator)), context=contexts, **assumed) + checks
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
