"""The report of a comparison, laid out and written: report.html, report.md and report.json in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from toolkit.compare.build import build
from toolkit.compare.data import ComparisonReport, Curve, MethodResult
from toolkit.compare.runs import Runs
from toolkit.errors import UserError
from toolkit.paths import replace_text
from toolkit.report import SUFFIXES, svg
from toolkit.report.elements import Chart, Item, Kind, Preformatted, Section, Table, table
from toolkit.report.html import page_html
from toolkit.report.markdown import page_markdown
from toolkit.report.outline import Outline
from toolkit.report.words import UNKNOWN, number, signed, size

_ROWS = 8
"""Of the table of losses over steps."""


@dataclass(frozen=True)
class Written:
    """What was written, and what the user is told of it."""

    headline: str
    notes: list[str]
    files: list[Path]


def write(runs: Runs) -> Written:
    """Write the report of what is there. Raises UserError where a file cannot be written."""
    report = build(runs)
    page = outline(report)
    texts = {"html": page_html(page), "markdown": page_markdown(page), "json": report.model_dump_json(indent=1) + "\n"}
    files = {kind: runs.out / f"report{end}" for kind, end in SUFFIXES.items()}
    for kind, path in files.items():
        try:
            replace_text(path, texts[kind])
        except OSError as error:
            raise UserError(f"the report {path} cannot be written: {error.strerror}.") from None
    return Written(report.headline, report.notes, list(files.values()))


def outline(report: ComparisonReport) -> Outline:
    """The layout of `report`."""
    sections = [Section("Methods", _methods(report))]
    if curves := _curves(report):
        sections.append(Section("Loss curves", curves))
    sections += [Section("Differences by seed", items) for items in [_differences(report)] if items]
    sections += [Section("Sweeps", items) for items in [_sweeps(report)] if items]
    sections.append(Section("Configs", _configs(report)))
    return Outline(
        title=report.title,
        headline=report.headline,
        gaps=report.notes,
        comparison=sections,
        runs=[],
        palette={},
        leanstate=report.leanstate,
        kind="Comparison of methods",
        gaps_title="Read with care",
    )


def _plus_minus(value: str, error: float | None) -> str:
    return value if error is None or value == UNKNOWN else f"{value} ± {error:.4f}"


def _methods(report: ComparisonReport) -> list[Item]:
    kind = next((method.peak_kind for method in report.methods if method.peak_kind), None)
    rows = []
    for method in _ranked(report):
        apart = method.difference
        rows.append(
            [
                method.name + ("" if method.tuned else " (untuned)"),
                _plus_minus(number(method.mean, 4), method.spread),
                str(len(method.losses)),
                UNKNOWN if apart is None else _plus_minus(signed(apart.mean, 4), apart.standard_error),
                UNKNOWN if apart is None else signed(apart.in_spreads, 1),
                size(method.peak),
                number(method.state_per_parameter),
                number(method.tokens_per_s, 0),
                ", ".join(f"{key} {value:g}" for key, value in method.best.items()) or UNKNOWN,
            ]
        )
    columns: list[tuple[str, Kind]] = [
        ("Method", "text"),
        ("Validation loss", "number"),
        ("Seeds", "number"),
        (f"− {report.baseline}", "number"),
        ("In spreads", "number"),
        ("Peak memory", "number"),
        ("State B/param", "number"),
        ("Tokens/s", "number"),
        ("Best values", "text"),
    ]
    about = (
        "Validation loss is the mean over seeds ± the standard deviation of one run. "
        f"“− {report.baseline}” is the mean of the differences from it, paired by seed, ± its standard error. “In "
        "spreads” is the difference of the means / √(1/n₁ + 1/n₂), in standard deviations of one run, pooled over both "
        "methods: below 2 it may be chance. "
    )
    if kind is not None:
        about += f"Peak memory is that {kind}, of the largest rank. "
    about += (
        "State is all that the optimizer keeps for itself, fp32 master weights included. (untuned): the best value is "
        "at the end of its sweep, or nothing was swept."
    )
    return [report.setting, table(columns, rows), about]


def _curves(report: ComparisonReport) -> list[Item]:
    drawn = _drawn(report)
    series = [
        svg.Series(method.name, method.curve.steps, method.curve.loss, index)
        for index, method in enumerate(drawn)
        if method.curve is not None
    ]
    few = f" Drawn are {report.baseline} and the lowest." if len(drawn) < len(report.methods) else ""
    about = f"Training loss at the best values, mean over seeds, smoothed, nats per token, over optimizer steps.{few}"
    drawing = svg.lines(series, "Training loss of all methods over optimizer steps", about)
    if not drawing:
        return []
    items: list[Item] = [Chart(drawing, [svg.dash(line.colour, line.name) for line in series], about)]
    apart = [
        svg.Series(method.name, method.difference.curve.steps, method.difference.curve.loss, index)
        for index, method in enumerate(drawn)
        if method.difference is not None and method.difference.curve is not None
    ]
    about = f"Training loss minus that of {report.baseline}, paired by seed and step; above zero is worse."
    drawing = svg.lines(apart, f"Difference in training loss from {report.baseline}", about, zero=True)
    if drawing:
        items.append(Chart(drawing, [svg.dash(line.colour, line.name) for line in apart], about))
    known = [(method.name, method.curve) for method in report.methods if method.curve is not None]
    return [*items, _points(known)]


def _drawn(report: ComparisonReport) -> list[MethodResult]:
    """The methods whose curves are drawn: as many as there are colours, the baseline among them."""
    rest = [method for method in _ranked(report) if method.name != report.baseline]
    return [method for method in report.methods if method.name == report.baseline] + rest[: svg.SERIES - 1]


def _ranked(report: ComparisonReport) -> list[MethodResult]:
    """The lowest loss first."""
    return sorted(report.methods, key=lambda method: (method.mean is None, method.mean or 0.0))


def _points(curves: list[tuple[str, Curve]]) -> Table:
    """A few points of the curves, for who cannot see them."""
    steps = max((curve.steps for _, curve in curves), key=len)
    shown = sorted({round((len(steps) - 1) * part / _ROWS) for part in range(1, _ROWS + 1)})
    at = [dict(zip(curve.steps, curve.loss, strict=True)) for _, curve in curves]
    rows = [[f"{steps[i]:,}", *(number(losses.get(steps[i]), 4) for losses in at)] for i in shown]
    columns: list[tuple[str, Kind]] = [("Loss at step", "number"), *((name, "number") for name, _ in curves)]
    return table(columns, rows)


def _differences(report: ComparisonReport) -> list[Item]:
    seeds = sorted({seed for method in report.methods for seed in method.losses})
    if not seeds:
        return []

    def row(method: MethodResult) -> list[str]:
        cells = []
        for seed in seeds:
            apart = method.difference.by_seed.get(seed) if method.difference is not None else None
            own = number(method.losses.get(seed), 4)
            cells.append(own if apart is None else f"{own} ({signed(apart, 4)})")
        return [method.name, *cells]

    columns: list[tuple[str, Kind]] = [("Method", "text"), *((f"Seed {seed}", "number") for seed in seeds)]
    about = f"Final validation loss at the best values, with the difference from {report.baseline} at the same seed."
    return [about, table(columns, [row(method) for method in report.methods])]


def _sweeps(report: ComparisonReport) -> list[Item]:
    swept = [(method.name, sweep) for method in report.methods for sweep in method.sweeps]
    if not swept:
        return []
    rows = []
    for name, sweep in swept:
        best = min((loss for loss in sweep.losses.values() if loss is not None), default=None)
        for value, loss in sweep.losses.items():
            told = "diverged" if value in sweep.diverged else number(loss, 4)
            mark = "best" if loss is not None and loss == best else ""
            if mark and sweep.verdict in ("lowest", "highest"):
                mark = "best, at the end of the sweep"
            rows.append([name, sweep.key, value, told, mark])
    columns: list[tuple[str, Kind]] = [
        ("Method", "text"),
        ("Key", "text"),
        ("Value", "number"),
        ("Validation loss", "number"),
        ("", "text"),
    ]
    about = "Each sweep is made at seed 0; later sweeps of a method at the best values of earlier ones."
    return [about, table(columns, rows)]


def _configs(report: ComparisonReport) -> list[Item]:
    items: list[Item] = []
    for method in report.methods:
        items.append(f"{method.name}, from {method.origin}; runs in {', '.join(method.runs) or 'none yet'}:")
        items.append(Preformatted(method.command))
        items.append(Preformatted(json.dumps(method.config, indent=1)))
    return items
