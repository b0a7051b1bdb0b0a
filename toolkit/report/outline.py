"""A whole report laid out: the comparison of several runs, then the sections of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from toolkit.records.run import LAST_STEPS
from toolkit.report import svg
from toolkit.report.compare import HELD
from toolkit.report.data import Report, RunReport
from toolkit.report.elements import Chart, Item, Kind, RunPart, Section, Table, legend, table
from toolkit.report.sections import run_part
from toolkit.report.words import UNKNOWN, duration, listed, number, signed

_BESIDE = {"lr": "Learning rate", "grad_norm": "Norm of the gradient", "tokens_per_s": "Tokens per second"}
"""Of the curves of a training, what is drawn beside the loss."""
_POINTS = 8
"""Rows of the table of losses."""


@dataclass(frozen=True)
class Outline:
    title: str
    headline: str
    gaps: list[str]
    comparison: list[Section]
    runs: list[RunPart]
    palette: dict[str, str]
    """The CSS colour of every category in the report."""
    leanstate: str
    kind: str = "Memory report"
    gaps_title: str = "Not like for like"


def outline(report: Report) -> Outline:
    """The layout of `report`."""
    names = {name for run in report.runs for name in _categories(run)}
    palette = svg.colours(names)
    return Outline(
        title=report.title,
        headline=report.headline,
        gaps=report.gaps,
        comparison=_compare(report, palette) if report.methods else [],
        runs=[run_part(run, palette) for run in report.runs],
        palette=palette,
        leanstate=report.leanstate,
    )


def _categories(run: RunReport) -> Iterable[str]:
    yield from (row.category for row in run.per_parameter)
    yield from (pair.name for comparison in run.comparisons for pair in comparison.categories)
    yield from run.timeline.timeline.held if run.timeline else ()
    yield from (name for rank in run.ranks for name in rank.held)
    yield from (block.category for block in run.blocks)
    yield from run.host
    yield from run.held_by
    for explained in run.out_of_memory:
        if explained.record is not None:
            yield from explained.record.held
            yield from (block.category for block in explained.record.blocks)
    yield from run.peak.held if run.peak else ()


def _compare(report: Report, palette: dict[str, str]) -> list[Section]:
    kind = next((method.memory_kind for method in report.methods if method.memory_kind), "not known")
    largest = max((method.memory or 0 for method in report.methods), default=0)
    unit, bytes_of_unit = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    rows = []
    for method in report.methods:
        paired = method.against_first
        error = "" if paired is None or paired.standard_error is None else f" ± {paired.standard_error:.4f}"
        rows.append(
            [
                method.optimizer or method.run,
                number(method.loss, 4),
                UNKNOWN if method.memory is None else f"{method.memory / bytes_of_unit:.2f}",
                UNKNOWN if paired is None else signed(paired.mean, 4) + error,
                number(method.val_loss, 4),
                method.state_format or UNKNOWN,
                method.weights or UNKNOWN,
                UNKNOWN if method.stage is None else str(method.stage),
                UNKNOWN if method.ranks is None else str(method.ranks),
                number(method.per_parameter),
                number(method.tokens_per_s, 0),
                duration(method.seconds),
                method.run,
            ]
        )
    columns: list[tuple[str, Kind]] = [
        ("Optimizer", "text"),
        ("Loss", "number"),
        (f"Memory ({unit})", "number"),
        ("Loss − first", "number"),
        ("Val. loss", "number"),
        ("State", "text"),
        ("Weights", "text"),
        ("ZeRO", "number"),
        ("Ranks", "number"),
        ("B/param", "number"),
        ("Tokens/s", "number"),
        ("Time", "number"),
        ("Run", "text"),
    ]
    first = report.runs[0].name
    items: list[Item] = []
    held = [(run.name, run.held_by if kind == HELD else run.peak.held if run.peak else {}) for run in report.runs]
    held = [(name, sizes) for name, sizes in held if sizes]
    if len(held) > 1:
        names = {name for _, sizes in held for name in sizes}
        title = f"Memory of each run by category, {kind}"
        items.append(Chart(svg.bars(held, palette, title), legend(names, palette), f"{title}."))
    items += [
        f"Loss is the mean of a run's last {LAST_STEPS} steps; memory is that {kind}, of the largest rank. "
        f"“Loss − first” is paired with {first} step by step, over the last {LAST_STEPS} steps that both made, ± its "
        "standard error.",
        table(columns, rows),
        *report.footnotes,
    ]
    sections = [Section("Methods", items)]
    if curves := _curves(report):
        sections.append(Section("Curves", curves))
    return sections


def _curves(report: Report) -> list[Item]:
    runs = [(index, run) for index, run in enumerate(report.runs) if run.training is not None]
    series = [
        svg.Series(run.name, run.training.curve.steps, run.training.curve.loss, index)
        for index, run in runs
        if run.training is not None
    ]
    about = "One curve a run: " + listed([line.name for line in series]) + "."
    drawing = svg.lines(series, "Training loss of all runs over optimizer steps, nats per token", about)
    if not drawing:
        return []
    keys = [svg.dash(index, run.name) for index, run in runs]
    items: list[Item] = [Chart(drawing, keys, "Training loss over optimizer steps, nats per token.")]
    paired = [(index, method) for index, method in enumerate(report.methods) if method.against_first is not None]
    differences = [
        svg.Series(method.run, method.against_first.steps, list(method.against_first.difference), index)
        for index, method in paired
        if method.against_first is not None
    ]
    about = f"Loss minus that of {report.runs[0].name} at the same step; above zero is worse."
    drawing = svg.lines(differences, "Difference in loss from the first run", about, zero=True)
    if drawing:
        items.append(Chart(drawing, [svg.dash(index, method.run) for index, method in paired], about))
    items.append(_loss_table(series))
    for of, title in _BESIDE.items():
        beside = [
            svg.Series(run.name, run.training.curve.steps, getattr(run.training.curve, of), index)
            for index, run in runs
            if run.training is not None
        ]
        if drawing := svg.lines(beside, f"{title} of all runs over optimizer steps", about):
            items.append(Chart(drawing, keys, f"{title} over optimizer steps."))
    return items


def _loss_table(series: list[svg.Series]) -> Table:
    """A few points of the curves, for who cannot see them."""
    last = max(max(line.xs) for line in series)
    steps = sorted({max(1, round(last * part / _POINTS)) for part in range(1, _POINTS + 1)})
    at = [dict(zip(line.xs, line.ys, strict=True)) for line in series]
    rows = [[f"{step:,}", *(number(losses.get(step), 4) for losses in at)] for step in steps]
    columns: list[tuple[str, Kind]] = [("Loss at step", "number"), *((line.name, "number") for line in series)]
    return table(columns, rows)
