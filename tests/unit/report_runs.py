"""Run folders as training leaves them, made of the record classes with the sizes of a Qwen3-134M."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from toolkit.records.categories import ordered
from toolkit.records.memory import (
    PREDICTED,
    Change,
    LargeTensor,
    Measurement,
    OutOfMemoryRecord,
    Phase,
    Prediction,
    Setup,
    Span,
    Timeline,
    measured_name,
    write_record,
)

PARAMETERS = 134_107_392
VOCABULARY_MATRIX = 2 * 32_000 * 768
ACTIVATIONS = 47_185_920
LAYERS = 12

# Bytes per parameter between steps, before sharding; weights stay whole at stage 2.
STATES = {
    "AMCS": {"remainder": 1.0, "m_fast": 1.0, "m_slow": 1.0, "v": 1.0, "scales": 0.047},
    "SOAM": {"remainder": 1.0, "m": 1.0, "v": 1.0, "scales": 0.031},
    "AdamW": {"master weights": 4.0, "exp_avg": 4.0, "exp_avg_sq": 4.0},
}


def setup(optimizer: str = "AMCS", ranks: int = 2, **changed: Any) -> Setup:
    ours = optimizer != "AdamW"
    facts: dict[str, Any] = {
        "model": "qwen3-134m",
        "parameters": PARAMETERS,
        "optimizer": optimizer,
        "stage": 2,
        "state_format": "8bit" if ours else "fp32",
        "weights": "bf16+8" if ours else "fp32",
        "world_size": ranks,
        "micro_batch": 4,
        "gradient_accumulation": 1,
        "seq_len": 256,
        "activations": "full",
        "attention": "sdpa",
        "loss": "chunked",
        "device": "cpu",
    }
    return Setup(**{**facts, **changed})


def step(optimizer: str, ranks: int, more: float = 1.0) -> tuple[Timeline, dict[str, int]]:
    """One step as it is held, and what stays between steps; `more` stretches the activations."""
    resident = {"weights": 2 * PARAMETERS}
    resident |= {name: int(size * PARAMETERS / ranks) for name, size in STATES[optimizer].items()}
    names = [*resident, "gradients", "buckets", "activations", "logits", "transients", "other"]
    samples: list[dict[str, int]] = []
    times: list[float] = []
    spans: list[Span] = []

    def phase(name: str, moments: list[dict[str, float]], each: float) -> None:
        begin = len(samples)
        for moment in moments:
            samples.append({**resident, "other": 1_650_000, **{key: int(value) for key, value in moment.items()}})
            times.append((times[-1] if times else 0.0) + each)
        spans.append(Span(name=name, start=begin, stop=len(samples)))

    block, kept = ACTIVATIONS * more, 2 * PARAMETERS / ranks
    forward = [{"activations": block * layer, "transients": 6e6} for layer in range(LAYERS + 1)]
    phase("forward", [*forward, {"activations": block * LAYERS, "logits": 131_072_000}], 9.0)
    backward: list[dict[str, float]] = [{"activations": block * LAYERS, "logits": 262_144_000, "transients": 8e6}]
    for layer in range(LAYERS, -1, -1):
        done = 1 - layer / LAYERS
        held = {"activations": block * layer, "gradients": kept * (0.36 + 0.64 * done), "buckets": 16_777_216}
        backward.append({**held, "transients": VOCABULARY_MATRIX if layer == LAYERS else 12e6})
    phase("backward", backward, 19.0)
    phase("reduce", [{"gradients": kept, "buckets": 16_777_216, "transients": VOCABULARY_MATRIX}], 12.0)
    copies = 7.5 * PARAMETERS / ranks if optimizer == "AdamW" else 2_400_000
    phase("step", [{"gradients": kept * (1 - part / 4), "transients": copies} for part in range(5)], 14.0)
    held = {name: [sample.get(name, 0) for sample in samples] for name in ordered(names)}
    return Timeline(milliseconds=times, spans=spans, held=held), resident


def phases(timeline: Timeline) -> list[Phase]:
    found = []
    for span in timeline.spans:
        totals = {
            index: sum(values[index] for values in timeline.held.values()) for index in range(span.start, span.stop)
        }
        at = max(totals, key=totals.__getitem__)
        held = {name: values[at] for name, values in timeline.held.items() if values[at]}
        found.append(Phase(name=span.name, peak=totals[at], held=held, resident_set=totals[at] + 480_000_000))
    return found


def measurement(optimizer: str = "AMCS", rank: int = 0, ranks: int = 2, **changed: Any) -> Measurement:
    timeline, resident = step(optimizer, ranks, more=1.0 if rank == 0 else 0.93)
    measured = phases(timeline)
    largest = max(measured, key=lambda phase: phase.peak or 0)
    facts: dict[str, Any] = {
        "setup": setup(optimizer, ranks),
        "rank": rank,
        "host": "worker-0",
        "device_name": "cpu",
        "level": "full",
        "source": "torch's CPU allocator",
        "step": 3,
        "peak": largest.peak,
        "peak_phase": largest.name,
        "phases": measured,
        "resident": {**resident, "other": 1_650_000},
        "timeline": timeline,
        "blocks": blocks(),
        "largest_resident_set": (largest.peak or 0) + 512_000_000,
        "overhead_seconds": 0.42,
        "steps": 40,
    }
    return Measurement(**{**facts, **changed})


def blocks() -> list[LargeTensor]:
    head = "transformers/models/qwen3/modeling_qwen3.py:476 forward"
    silu = LargeTensor(
        bytes=12_582_912,
        category="activations",
        what="silu",
        where="transformers/models/qwen3/modeling_qwen3.py:83 forward",
        phase="forward",
    )
    return [
        LargeTensor(bytes=131_072_000, category="logits", what="linear", where=head, phase="forward"),
        LargeTensor(
            bytes=131_072_000,
            category="logits",
            what="log_softmax backward",
            where="LogSoftmaxBackward0",
            phase="backward",
        ),
        LargeTensor(
            bytes=VOCABULARY_MATRIX, category="weights", what="model.embed_tokens.weight", where="", phase="init"
        ),
        LargeTensor(bytes=VOCABULARY_MATRIX, category="weights", what="lm_head.weight", where="", phase="init"),
        *[silu] * LAYERS,
        LargeTensor(bytes=12_288_000, category="m_fast", what="lm_head.weight m_fast", where="", phase="init"),
    ]


def changes() -> list[Change]:
    peak = prediction_peak("AMCS", 2)
    return [
        Change(change="--activations checkpoint", saves=498_000_000, peak=peak - 498_000_000),
        Change(change="--micro-batch 2", saves=414_200_000, peak=peak - 414_200_000),
        Change(change="zero_optimization.stage 3", saves=101_400_000, peak=peak - 101_400_000),
        Change(change="optimizer.params.state_format compact", saves=33_500_000, peak=peak - 33_500_000),
        Change(change="optimizer.params.weights fp32", saves=-201_161_088, peak=peak + 201_161_088),
    ]


def prediction_peak(optimizer: str, ranks: int) -> int:
    return max(phase.peak or 0 for phase in phases(step(optimizer, ranks, more=0.985)[0]))


def prediction(optimizer: str = "AMCS", ranks: int = 2, **changed: Any) -> Prediction:
    timeline, resident = step(optimizer, ranks, more=0.985)
    predicted = phases(timeline)
    for phase in predicted:
        phase.resident_set = None
    largest = max(predicted, key=lambda phase: phase.peak or 0)
    facts: dict[str, Any] = {
        "setup": setup(optimizer, ranks),
        "peak": largest.peak,
        "peak_phase": largest.name,
        "phases": predicted,
        "timeline": timeline.model_copy(update={"milliseconds": None}),
        "resident": resident,
        "per_block": {"kept": ACTIVATIONS, "largest moment": 2 * ACTIVATIONS},
        "changes": changes() if optimizer == "AMCS" else [],
    }
    return Prediction(**{**facts, **changed})


def out_of_memory() -> OutOfMemoryRecord:
    held = next(phase.held for phase in phases(step("AMCS", 2)[0]) if phase.name == "backward")
    return OutOfMemoryRecord(
        setup=setup(),
        rank=1,
        phase="backward",
        step=2,
        asked=131_072_000,
        limit=1_500_000_000,
        held=held,
        blocks=blocks()[:3],
        changes=changes()[:3],
        message="DefaultCPUAllocator: can't allocate memory: you tried to allocate 131072000 bytes.",
    )


def losses(steps: int, seed: int, better: float = 0.0) -> list[float]:
    """A curve like that of a first run; runs of one seed share the noise of their batches."""
    noise = random.Random(seed)
    return [
        4.4 + 6.0 * math.exp(-index / (22 - 8 * better)) - 0.25 * better + noise.gauss(0, 0.06)
        for index in range(steps)
    ]


def write_training(
    folder: Path,
    optimizer: str = "AMCS",
    ranks: int = 2,
    steps: int = 40,
    *,
    seed: int = 0,
    better: float = 0.0,
    **settings: Any,
) -> None:
    """run.json, ds_config.json, metrics.jsonl and summary.json."""
    folder.mkdir(parents=True, exist_ok=True)
    of = setup(optimizer, ranks)
    parameters = {"lr": 6e-4} | ({} if optimizer == "AdamW" else {"state_format": "8bit", "weights": "bf16+8"})
    config = {
        "train_micro_batch_size_per_gpu": of.micro_batch,
        "optimizer": {"type": optimizer, "params": parameters},
        "zero_optimization": {"stage": of.stage},
    }
    chosen = {"model": of.model, "data": "stdlib", "steps": steps, "seq_len": of.seq_len, "seed": seed, **settings}
    run = {
        "started": "2026-11-25T17:44:27+00:00",
        "settings": chosen,
        "world_size": ranks,
        "micro_batch": of.micro_batch,
        "gradient_accumulation": 1,
        "global_batch": of.micro_batch * ranks,
        "parameters": settings.pop("parameters", PARAMETERS),
        "device": "cpu",
        "ds_config": config,
        "versions": {"python": "3.11.7", "leanstate": "0.1.0", "torch": "2.13.0+cpu", "deepspeed": "0.19.8"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "ds_config.json").write_text(json.dumps(config))
    curve = losses(steps, seed, better)
    records: list[dict[str, Any]] = []
    for index, loss in enumerate(curve, 1):
        seconds = 9.7 if index == 1 else 0.32 + 0.01 * (index % 3)
        record = {"step": index, "loss": loss, "lr": 6e-4, "grad_norm": 1.0, "tokens_per_s": 256 * 8 / seconds}
        record |= {"step_time_s": seconds, "memory_bytes": 1_900_000_000 + index, "skipped": False}
        if index == 1:
            record["compile_s"] = 41.0
        if index % 10 == 0:
            record["val_loss"] = loss + 0.08
        records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {"interrupted": False, "steps": steps, "peak_memory_bytes": 1_910_000_000, "memory_kind": "resident"}
    (folder / "summary.json").write_text(json.dumps(summary))


def write_run(folder: Path, optimizer: str = "AMCS", ranks: int = 2, **training: Any) -> Path:
    """A whole run with its memory folder; returns `folder`."""
    write_training(folder, optimizer, ranks, **training)
    write_record(folder, PREDICTED, prediction(optimizer, ranks))
    for rank in range(ranks):
        write_record(folder, measured_name(rank), measurement(optimizer, rank, ranks))
    return folder
