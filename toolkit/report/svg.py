"""Charts as inline SVG. Colours are CSS variables of the page, so that dark mode and paper have their own.

A chart is as wide as its place. Positions across are percentages and heights are pixels, so text keeps its size however
narrow the page is; shapes are drawn in an inner SVG of 1000 units that stretches. Every text that comes from outside is
escaped here.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from toolkit.records.categories import MEANING, in_order, ordered
from toolkit.records.memory import Span, Timeline
from toolkit.records.sizes import SHOWN_UNITS
from toolkit.report.words import size

_STATES, SERIES = 8, 6
"""How many colours the page has for optimizer states and for runs; more start over."""
_POINTS = 600
"""More of a curve than a screen has pixels is not drawn."""
_NARROW, _WIDE = 300, 760
"""Pixels across a chart on a phone and on a screen: a label is shown where it fits."""
_LONGEST_NAME = 34
"""Characters of a bar's name that fit on a phone beside the bar's size; text in a drawing does not wrap."""
_NARROWEST = 0.08
"""Of a timeline's samples: the least that a phase is drawn wide as, where there is no time."""
_CHARACTER = 7.0
"""Pixels of a character of a label, about."""


def colours(categories: Iterable[str]) -> dict[str, str]:
    """The CSS colour of each category, the same in all charts of a page that share `categories`."""
    names = ordered(categories)
    states = [name for name in names if name not in MEANING]
    return {
        name: f"var(--{name.replace(' ', '-')})" if name in MEANING else f"var(--state-{states.index(name) % _STATES})"
        for name in names
    }


def series_colour(index: int) -> str:
    return f"var(--run-{index % SERIES})"


def timeline(timeline: Timeline, palette: Mapping[str, str], title: str, predicted_peak: int | None) -> Markup:
    """Bytes over a step, stacked by category: phases below, the peak marked, `predicted_peak` as a line."""
    across = _across(timeline)
    sampled = {name: [values[index] for index in across.samples] for name, values in in_order(timeline.held).items()}
    layers = [(name, values) for name, values in sampled.items() if any(values)]
    totals = [sum(values) for values in zip(*(values for _, values in layers), strict=True)]
    xs = across.xs
    top = max([*totals, predicted_peak or 0])
    peak = max(range(len(totals)), key=totals.__getitem__)
    axis = _Axis(0.0, top * 1.06, height=340, unit=_bytes_unit(top))
    below = [0.0] * len(totals)
    shapes, labels = [], []
    for name, values in layers:
        above = [low + value for low, value in zip(below, values, strict=True)]
        points = [*_steps(xs, above), *reversed(_steps(xs, below))]
        path = " ".join(f"{10 * x:.1f},{axis.unit_y(y):.1f}" for x, y in points)
        shapes.append(Markup('<polygon points="{}" style="fill:{}"/>').format(path, Markup(palette[name])))
        labels.append(_layer_label(name, xs, below, above, axis, xs[peak]))
        below = above
    marks = [_peak_mark(xs[peak], axis.y(totals[peak]), f"peak {size(totals[peak])}", axis.height)]
    if predicted_peak:
        y = axis.y(predicted_peak)
        marks.insert(0, Markup('<line class="reference" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(f"{y:.1f}"))
    parts = [axis.grid(), _stretched(shapes, axis.height, "layers"), *marks, *labels]
    parts.append(_phases(across.phases, axis.height + 6))
    more = 0
    # Names that have no room in their phases: below them, on narrow pages more of them than on wide ones.
    for page, fitting in (("narrow", ("",)), ("wide", ("", "wide"))):
        if names := [name for name, left, right in across.phases if _fits(name, right - left) not in fitting]:
            more = 16
            text = Markup('<text class="tick across last {}" x="100%" y="{}">{}</text>')
            parts.append(text.format(page, axis.height + 42, ", ".join(names)))
    if across.times is not None:
        parts.append(_ticks_across(*across.times, axis.height + 46 + more, " ms"))
    about = f"Stacked areas over one training step; the peak is {size(totals[peak])}. Tables have the sizes."
    return _chart(parts, axis.height + more + (32 if across.times is None else 52), title, about)


def _steps(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """The corners of a staircase: memory that is allocated is held from then on, at once and whole."""
    corners = [(xs[0], ys[0])]
    for x, before, y in zip(xs[1:], ys[:-1], ys[1:], strict=True):
        corners += [(x, before), (x, y)]
    return corners


@dataclass(frozen=True)
class _Across:
    """Where samples and phases lie across a timeline, in percent."""

    samples: list[int]
    xs: list[float]
    phases: list[tuple[str, float, float]]
    times: tuple[float, float] | None = None
    """Milliseconds at both ends."""


def _across(timeline: Timeline) -> _Across:
    count, times = len(next(iter(timeline.held.values()))), timeline.milliseconds
    if times and times[-1] > times[0]:
        length = times[-1] - times[0]
        xs = [100 * (time - times[0]) / length for time in times]
        ends = [[min(max(place, 0), count - 1) for place in (span.start, span.stop)] for span in timeline.spans]
        phases = [(span.name, xs[start], xs[stop]) for span, (start, stop) in zip(timeline.spans, ends, strict=True)]
        return _Across(list(range(count)), xs, phases, (times[0], times[-1]))
    # A prediction's samples have no time. A phase is as wide as it has samples, but none too narrow to be seen, and
    # each ends with its last sample again, or a phase of one sample would have no width.
    spans = timeline.spans
    edges = [0, *(span.stop for span in spans)]
    if [span.start for span in spans] != edges[:-1] or edges[-1] != count or any(a >= b for a, b in pairwise(edges)):
        spans = [Span(name="", start=0, stop=count)]
    widths = [max(span.stop - span.start, _NARROWEST * count) for span in spans]
    samples: list[int] = []
    xs, phases, x = [], [], 0.0
    for span, share in zip(spans, widths, strict=True):
        width, inside = 100 * share / sum(widths), span.stop - span.start
        samples += [*range(span.start, span.stop), span.stop - 1]
        xs += [x + width * index / inside for index in range(inside + 1)]
        phases.append((span.name, x, x + width))
        x += width
    return _Across(samples, xs, phases)


def bars(rows: Sequence[tuple[str, Mapping[str, int]]], palette: Mapping[str, str], title: str) -> Markup:
    """A horizontal bar for each row (label, bytes by category) on one scale."""
    top = max((sum(sizes.values()) for _, sizes in rows), default=0) or 1
    parts, y = [], 0
    for label, sizes in rows:
        total = sum(sizes.values())
        parts.append(Markup('<text class="name" x="0" y="{}">{}</text>').format(y + 13, _short(label)))
        parts.append(Markup('<text class="value" x="100%" y="{}">{}</text>').format(y + 13, size(total)))
        start = 0.0
        names = []
        for name, count in in_order(sizes).items():
            width = 100 * count / top
            parts.append(
                Markup(
                    '<rect class="piece" x="{:.3f}%" y="{}" width="{:.3f}%" height="22" style="fill:{}">'
                    "<title>{}: {}</title></rect>"
                ).format(start, y + 20, width, Markup(palette[name]), name, size(count))
            )
            if (where := _fits(name, width)) is not None:
                inside = Markup('<text class="layer {}" x="{:.2f}%" y="{}">{}</text>')
                names.append(inside.format(where, start + width / 2, y + 35, name))
            start += width
        parts += names
        y += 56
    about = "; ".join(f"{label}: {size(sum(sizes.values()))}" for label, sizes in rows)
    return _chart(parts, y, title, about, full=True)


def _short(name: str) -> str:
    """`name` with its middle left out where it is too long: runs differ at their ends."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[-half + 1 :]}"


@dataclass(frozen=True)
class Series:
    """One line of a chart; a value of None leaves a gap."""

    name: str
    xs: Sequence[int]
    ys: Sequence[float | None]
    colour: int
    points: bool = False


def lines(series: Sequence[Series], title: str, about: str, *, zero: bool = False) -> Markup:
    """Curves over optimizer steps on one pair of axes, with a line at zero where `zero` says so."""
    values = [value for line in series for value in line.ys if value is not None]
    places = [step for line in series for step in line.xs]
    if not values or not places:
        return Markup("")
    begin, end = min(places), max(places)
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = (high - low) * 0.04 or abs(high) * 0.01 or 1.0
    axis = _Axis(low - margin, high + margin, height=240, unit=_plain)
    parts, shapes = [axis.grid()], []
    if zero:
        parts.append(Markup('<line class="zero" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(axis.y(0.0)))
    dots = []
    for line in series:
        colour = Markup(series_colour(line.colour))
        spots = [(100 * (x - begin) / ((end - begin) or 1), y) for x, y in zip(line.xs, line.ys, strict=True)]
        for run in _unbroken(spots):
            run = _thinned(run)
            if len(run) > 1 and not line.points:
                path = " ".join(f"{10 * x:.1f},{axis.unit_y(y):.1f}" for x, y in run)
                shapes.append(
                    Markup('<polyline class="line dash-{}" points="{}" style="stroke:{}"/>').format(
                        line.colour % SERIES, path, colour
                    )
                )
            # One value between two gaps has no line; it must not vanish.
            for x, y in run if line.points or len(run) == 1 else ():
                kind = "dot open" if line.points else "dot"
                dots.append(
                    Markup('<circle class="{}" cx="{:.2f}%" cy="{:.1f}" r="4" style="--c:{}"/>').format(
                        kind, x, axis.y(y), colour
                    )
                )
    parts += [_stretched(shapes, axis.height, "curves"), *dots]
    parts.append(_ticks_across(begin, end, axis.height + 18, ""))
    return _chart(parts, axis.height + 24, title, about)


class _Axis:
    """From values to pixels from the top, with round ticks."""

    def __init__(self, low: float, high: float, height: int, unit: Callable[[float], str]) -> None:
        self.height, self._unit = height, unit
        span = (high - low) or 1.0
        self.low, self.high = low, low + span
        step = _round_step(span / 6)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        self.ticks = [step * index for index in range(first, last + 1)]

    def y(self, value: float) -> float:
        return self.height * (1 - (value - self.low) / (self.high - self.low))

    def unit_y(self, value: float) -> float:
        return 1000 * self.y(value) / self.height

    def grid(self) -> Markup:
        parts = []
        for tick in self.ticks:
            y = f"{self.y(tick):.1f}"
            parts.append(Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(y))
            text = self._unit(tick)
            parts.append(Markup('<text class="tick up" x="-8" y="{}">{}</text>').format(y, text))
        return Markup("").join(parts)


def _round_step(about: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `about`."""
    power = 10.0 ** math.floor(math.log10(about))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= about * 0.999)


def _bytes_unit(top: float) -> Callable[[float], str]:
    """Writes ticks of an axis that reaches `top` bytes, all in one unit."""
    name, factor = next((unit for unit in SHOWN_UNITS if top >= unit[1]), ("B", 1.0))
    return lambda value: f"{value / factor:.4g} {name}" if value else "0"


def _plain(value: float) -> str:
    text = f"{value:.4g}"
    if 0 < abs(value) < 1e-3:  # 2e-4 has room beside the axis, where 0.0002 and 2e-05 do not read as easily
        digits, _, power = f"{value:.2e}".partition("e")
        text = f"{float(digits):g}e{int(power)}"
    return text.replace("-", "−")


def _chart(parts: Iterable[Markup], height: int, title: str, about: str, *, full: bool = False) -> Markup:
    return Markup(
        '<svg class="chart{}" role="img" width="100%" height="{}"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(" full" if full else "", height, title, about, Markup("").join(parts))


def _stretched(shapes: Iterable[Markup], height: int, kind: str) -> Markup:
    return Markup(
        '<svg class="{}" width="100%" height="{}" viewBox="0 0 1000 1000" preserveAspectRatio="none">{}</svg>'
    ).format(kind, height, Markup("").join(shapes))


def _fits(text: str, across: float) -> str | None:
    """The class of a label in a place `across` percent wide: shown always, on wide pages only (or None: never)."""
    needed = _CHARACTER * len(text) + 6
    if across * _NARROW / 100 >= needed:
        return ""
    return "wide" if across * _WIDE / 100 >= needed else None


def _layer_label(
    name: str, xs: Sequence[float], below: Sequence[float], above: Sequence[float], axis: _Axis, peak: float
) -> Markup:
    """The name inside its layer, where that is thick enough for a line of text over the text's width.

    A place that does for a narrow page comes first, then one off the line of the peak, then the thickest.
    """
    best: tuple[tuple[bool, bool, float], float, float] | None = None
    for page in (_NARROW, _WIDE):
        half = 100 * (_CHARACTER * len(name) + 6) / page / 2
        for x in xs:
            if not half <= x <= 100 - half:
                continue
            # The samples under the text, and those next to it: between samples a layer's edges are straight.
            near = range(max(0, bisect_left(xs, x - half) - 1), min(len(xs), bisect_right(xs, x + half) + 1))
            high, low = max(axis.y(above[i]) for i in near), min(axis.y(below[i]) for i in near)
            rank = (page == _NARROW, abs(x - peak) > half, low - high)
            if low - high >= 15 and (best is None or rank > best[0]):
                best = rank, x, (high + low) / 2
    if best is None:
        return Markup("")
    (narrow, *_), x, y = best
    return Markup('<text class="layer{}" x="{:.2f}%" y="{:.1f}">{}</text>').format(
        "" if narrow else " wide", x, y + 4, name
    )


def _peak_mark(x: float, y: float, text: str, bottom: int) -> Markup:
    side = "end" if x > 50 else "start"
    return Markup(
        '<line class="peak" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1:.1f}" y2="{6}"/>'
        '<circle class="peak" cx="{0:.2f}%" cy="{1:.1f}" r="3.5"/>'
        '<text class="peak {2}" x="{0:.2f}%" dx="{3}" y="{4:.1f}">{5}</text>'
    ).format(x, y, side, -8 if side == "end" else 8, y - 7, text, bottom)


def _phases(phases: Sequence[tuple[str, float, float]], y: int) -> Markup:
    parts = []
    for index, (name, left, right) in enumerate(phases):
        if right <= left:
            continue
        parts.append(
            Markup(
                '<rect class="phase {}" x="{:.2f}%" y="{}" width="{:.2f}%" height="22"><title>{}</title></rect>'
            ).format("odd" if index % 2 else "even", left, y, right - left, name)
        )
        where = _fits(name, right - left)
        if where is not None:
            parts.append(
                Markup('<text class="phase {}" x="{:.2f}%" y="{}">{}</text>').format(
                    where, (left + right) / 2, y + 15, name
                )
            )
    return Markup("").join(parts)


def _ticks_across(begin: float, end: float, y: int, unit: str) -> Markup:
    if end <= begin:
        return Markup('<text class="tick across" x="0" y="{}">{}{}</text>').format(y, _step_text(begin), unit)
    step = max(_round_step((end - begin) / 4), 1.0 if not unit else 0.0)
    first, last = math.ceil(begin / step - 1e-9), math.floor(end / step + 1e-9)
    ticks = [step * index for index in range(first, last + 1)]
    parts = []
    for tick in ticks:
        x = 100 * (tick - begin) / (end - begin)
        side = " first" if x < 4 else " last" if x > 92 else ""
        parts.append(
            Markup('<text class="tick across{}" x="{:.2f}%" y="{}">{}{}</text>').format(
                side, x, y, _step_text(tick), unit
            )
        )
    return Markup("").join(parts)


def _step_text(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.4g}"


def _unbroken(spots: Iterable[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Pieces of a curve between its gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in spots:
        if y is not None:
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _thinned(piece: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest and highest point of each of so many parts: a spike stays a spike."""
    if len(piece) <= _POINTS:
        return piece
    edges = [round(index * len(piece) / (_POINTS // 2)) for index in range(_POINTS // 2 + 1)]
    found: list[tuple[float, float]] = []
    for start, stop in pairwise(edges):
        part = piece[start:stop]
        found += sorted({min(part, key=lambda spot: spot[1]), max(part, key=lambda spot: spot[1])})
    return found


def swatch(colour: str) -> Markup:
    return Markup('<i class="swatch" style="background:{}"></i>').format(Markup(colour))


def dash(index: int, name: str) -> Markup:
    """A legend's entry for a curve: its dash and its name."""
    return Markup(
        '<span class="key"><svg width="30" height="10" aria-hidden="true">'
        '<line class="line dash-{}" x1="1" x2="29" y1="5" y2="5" style="stroke:{}"/></svg>{}</span>'
    ).format(index % SERIES, Markup(series_colour(index)), escape(name))
