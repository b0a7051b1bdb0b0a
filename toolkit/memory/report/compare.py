"""Several runs side by side: in what they are not alike, the papers' table, and loss paired step by step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from toolkit.errors import UserError
from toolkit.memory.report.build import LAST_STEPS, build_run
from toolkit.memory.report.data import Method, Paired, Report, RunReport
from toolkit.memory.report.read import read_folder
from toolkit.memory.report.words import listed, size
from toolkit.printable import printable

# What a comparison of losses takes to be equal, with the reason why it matters.
_EQUAL: tuple[tuple[str, Callable[[RunReport], object], str], ...] = (
    ("model", lambda run: run.facts.model, "neither loss nor memory compares"),
    ("number of parameters", lambda run: run.facts.parameters, "memory compares per parameter only"),
    ("data", lambda run: run.facts.data, "the losses are of different text"),
    ("tokenizer", lambda run: run.facts.tokenizer, "the losses are per different tokens"),
    ("sequence length", lambda run: run.facts.seq_len, "the losses and activations are of different contexts"),
    ("global batch", lambda run: run.facts.global_batch, "a step is not the same number of sequences"),
    ("token budget", lambda run: run.training.tokens if run.training else None, "one was trained for longer"),
    (
        "steps asked for",
        lambda run: run.facts.steps,
        "schedules of different length stand at different points at a step",
    ),
    ("seed", lambda run: run.facts.seed, "initial weights and the order of data differ, so losses pair less tightly"),
    ("kind of memory", lambda run: run.peak.kind if run.peak else None, "the sizes are of different things"),
    ("micro-batch", lambda run: run.facts.micro_batch, "activations are of different numbers of sequences"),
    ("ranks", lambda run: run.facts.world_size, "memory is that of one rank, which shards differ in"),
    ("device", lambda run: run.facts.device, "speed and memory are of different devices"),
)


def build_report(paths: Sequence[Path]) -> Report:
    """The report of the runs in `paths`, in this order.

    Raises:
        UserError: a folder is missing, holds no run, or is given twice.
    """
    for index, path in enumerate(paths):
        if path.resolve() in {other.resolve() for other in paths[:index]}:
            raise UserError(f"the run folder {path} is given twice.")
    runs = [build_run(read_folder(path), name) for path, name in zip(paths, _names(paths), strict=True)]
    several = len(runs) > 1
    return Report(
        title=runs[0].name if not several else f"{len(runs)} runs",
        headline=_headline(runs) if several else runs[0].headline,
        gaps=_gaps(runs),
        methods=[_method(run, runs[0]) for run in runs] if several else [],
        runs=runs,
        leanstate=_version(),
    )


def _version() -> str:
    try:
        return metadata.version("leanstate")
    except metadata.PackageNotFoundError:
        return "not installed"


def _names(paths: Sequence[Path]) -> list[str]:
    """Each folder's own name, with as many of its parents' as tell it from the others."""
    parts = [tuple(map(printable, path.resolve().parts)) for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _gaps(runs: Sequence[RunReport]) -> list[str]:
    gaps = []
    for name, read, why in _EQUAL:
        values: dict[str, list[str]] = {}
        for run in runs:
            value = read(run)
            text = "not known" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
            values.setdefault(text, []).append(run.name)
        if len(values) > 1:
            what = "; ".join(f"{value} in {listed(names)}" for value, names in values.items())
            gaps.append(f"Different {name}: {what} ({why}).")
    unfinished = [run.name for run in runs if run.training is None or not run.training.complete]
    if unfinished and len(runs) > 1:
        gaps.append(f"Not finished: {listed(unfinished)}.")
    return gaps


def _headline(runs: Sequence[RunReport]) -> str:
    parts = []
    sizes = [run for run in runs if run.peak is not None]
    if len(sizes) > 1:
        least, *_, most = sorted(sizes, key=lambda run: run.peak.bytes if run.peak else 0)
        assert least.peak is not None and most.peak is not None
        less = most.peak.bytes - least.peak.bytes
        parts.append(
            f"{least.name} takes the least memory, {size(least.peak.bytes)}: {size(less)} less than {most.name}."
            if less
            else f"All take the same memory, {size(least.peak.bytes)}."
        )
    losses = sorted((run.training.loss, run.name) for run in runs if run.training and run.training.loss is not None)
    if losses:
        parts.append(f"{losses[0][1]} has the lowest training loss, {losses[0][0]:.4f}.")
    return " ".join(parts) or "Neither memory nor loss of these runs is known."


def _method(run: RunReport, first: RunReport) -> Method:
    facts, training, peak = run.facts, run.training, run.peak
    return Method(
        run=run.name,
        optimizer=facts.optimizer,
        loss=training.loss if training else None,
        val_loss=training.val_loss if training else None,
        memory=peak.bytes if peak else None,
        memory_kind=peak.kind if peak else None,
        state_format=facts.state_format,
        weights=facts.weights,
        stage=facts.stage,
        ranks=facts.world_size,
        per_parameter=peak.per_parameter if peak else None,
        tokens_per_s=training.tokens_per_s if training else None,
        seconds=training.seconds if training else None,
        against_first=_paired(run, first),
    )


def _paired(run: RunReport, first: RunReport) -> Paired | None:
    if run is first or run.training is None or first.training is None:
        return None
    base = dict(zip(first.training.curve.steps, first.training.curve.loss, strict=True))
    mine = dict(zip(run.training.curve.steps, run.training.curve.loss, strict=True))
    both = [(step, loss, base.get(step)) for step, loss in sorted(mine.items())]
    pairs = [(step, loss - other) for step, loss, other in both if loss is not None and other is not None]
    if not pairs:
        return None
    last = [difference for _, difference in pairs[-LAST_STEPS:]]
    return Paired(
        steps=[step for step, _ in pairs],
        difference=[difference for _, difference in pairs],
        mean=statistics.fmean(last),
        standard_error=statistics.stdev(last) / math.sqrt(len(last)) if len(last) > 1 else None,
        over=len(last),
    )
