"""Several runs side by side: in what they are not alike, the papers' table, and loss paired step by step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from toolkit.errors import UserError
from toolkit.printable import printable
from toolkit.records.run import LAST_STEPS
from toolkit.report.data import Method, Paired, Report, RunReport
from toolkit.report.read import read_folder
from toolkit.report.run_report import build_run
from toolkit.report.words import batch_words, listed, size

# What a comparison of losses takes to be equal, with the reason why it matters.
_EQUAL: tuple[tuple[str, Callable[[RunReport], object], str], ...] = (
    ("model", lambda run: run.facts.model, "neither loss nor memory compares"),
    ("number of parameters", lambda run: run.facts.parameters, "memory compares per parameter only"),
    ("data", lambda run: run.facts.data, "the losses are of different text"),
    ("tokenizer", lambda run: run.facts.tokenizer, "the losses are per different tokens"),
    ("sequence length", lambda run: run.facts.seq_len, "the losses and activations are of different contexts"),
    ("global batch", batch_words, "a step is not the same number of sequences"),
    ("token budget", lambda run: run.training.tokens if run.training else None, "one was trained for longer"),
    (
        "steps asked for",
        lambda run: run.facts.steps,
        "schedules of different length stand at different points at a step",
    ),
    ("learning rate", lambda run: run.facts.learning_rate, "no optimizer is at its best at another's rate"),
    ("betas", lambda run: run.facts.betas, "momenta average over different numbers of steps"),
    ("weight decay", lambda run: run.facts.weight_decay, "weights are pulled towards zero differently"),
    ("gradient clipping", lambda run: run.facts.clipping, "gradients are cut to different norms"),
    ("scheduler", lambda run: run.facts.scheduler, "rates take different courses"),
    ("warm-up", lambda run: run.facts.warmup, "rates rise over different numbers of steps"),
    ("seed", lambda run: run.facts.seed, "initial weights and the order of data differ, so losses pair less tightly"),
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
    kind, sizes = comparable(runs)
    return Report(
        title=runs[0].name if not several else f"{len(runs)} runs",
        headline=_headline(runs, kind, sizes) if several else runs[0].headline,
        gaps=gaps(runs) + _unknown_memory(runs, kind, sizes),
        methods=[_method(run, runs[0], kind, one) for run, one in zip(runs, sizes, strict=True)] if several else [],
        footnotes=_footnotes(runs) if several else [],
        runs=runs,
        leanstate=version(),
    )


def version() -> str:
    """Of this package."""
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


def gaps(runs: Sequence[RunReport]) -> list[str]:
    """In what the runs differ that a comparison takes to be equal, a sentence each."""
    found = []
    for name, read, why in _EQUAL:
        values: dict[str, list[str]] = {}
        for run in runs:
            value = read(run)
            text = "not known" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
            values.setdefault(text, []).append(run.name)
        if len(values) > 1:
            what = "; ".join(f"{value} in {listed(names)}" for value, names in values.items())
            found.append(f"Different {name}: {what} ({why}).")
    unfinished = [run.name for run in runs if run.training is None or not run.training.complete]
    if unfinished and len(runs) > 1:
        found.append(f"Not finished: {listed(unfinished)}.")
    return found


ALLOCATED, HELD, PREDICTED, PROCESS = (
    "allocated at the peak",
    "held by the model between steps",
    "at the predicted peak",
    "of resident set, libraries included",
)


def comparable(runs: Sequence[RunReport]) -> tuple[str | None, list[int | None]]:
    """The memory of each run, all of one kind: the best that most of them have, bytes held by the model first.

    A resident set is mostly libraries and what the C library keeps: it stands for memory only where nothing else does.
    """
    kinds: dict[str, list[int | None]] = {
        ALLOCATED: [run.peak.bytes if run.peak and run.peak.kind == "allocated" else None for run in runs],
        HELD: [run.held for run in runs],
        PREDICTED: [run.predicted_peak for run in runs],
    }
    best = max(kinds, key=lambda kind: sum(one is not None for one in kinds[kind]))  # the first of those with most
    if not any(one is not None for one in kinds[best]):
        best, kinds = PROCESS, {PROCESS: [run.resident_set for run in runs]}
    return (best if any(one is not None for one in kinds[best]) else None), kinds[best]


def _unknown_memory(runs: Sequence[RunReport], kind: str | None, sizes: Sequence[int | None]) -> list[str]:
    missing = [run.name for run, memory in zip(runs, sizes, strict=True) if memory is None]
    return [f"Memory {kind} is not known of {listed(missing)}."] if kind and missing and len(runs) > 1 else []


def _footnotes(runs: Sequence[RunReport]) -> list[str]:
    known = [f"{run.name} {size(run.resident_set)}" for run in runs if run.resident_set is not None]
    if not known:
        return []
    return [f"Resident sets, the whole process with its libraries, which say little of the model: {listed(known)}."]


def _headline(runs: Sequence[RunReport], kind: str | None, sizes: Sequence[int | None]) -> str:
    parts = []
    known = sorted((memory, run.name) for run, memory in zip(runs, sizes, strict=True) if memory is not None)
    if len(known) > 1:
        (least, name), (most, other) = known[0], known[-1]
        parts.append(
            f"{name} takes the least memory, {size(least)} {kind}: {size(most - least)} less than {other}."
            if most > least
            else f"All take the same memory, {size(least)} {kind}."
        )
    losses = sorted((run.training.loss, run.name) for run in runs if run.training and run.training.loss is not None)
    if losses:
        parts.append(f"{losses[0][1]} has the lowest training loss, {losses[0][0]:.4f}.")
    return " ".join(parts) or "Neither memory nor loss of these runs is known."


def _method(run: RunReport, first: RunReport, kind: str | None, memory: int | None) -> Method:
    facts, training = run.facts, run.training
    return Method(
        run=run.name,
        optimizer=facts.optimizer,
        loss=training.loss if training else None,
        val_loss=training.val_loss if training else None,
        memory=memory,
        memory_kind=kind if memory is not None else None,
        resident_set=run.resident_set,
        state_format=facts.state_format,
        weights=facts.weights,
        stage=facts.stage,
        ranks=facts.world_size,
        # A resident set is mostly libraries: per parameter it would say nothing.
        per_parameter=memory / facts.parameters if memory and facts.parameters and kind != PROCESS else None,
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
