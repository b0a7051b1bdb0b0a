"""What a report is laid out in: sections of sentences, tables and charts, which HTML and Markdown only spell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

from toolkit.records.categories import ordered
from toolkit.report import svg
from toolkit.report.words import UNKNOWN

Kind = Literal["text", "prose", "number", "category", "code"]


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    columns: list[tuple[str, Kind]]
    rows: list[list[str]]
    total: bool = False
    """The last row sums up the others."""


@dataclass(frozen=True)
class Chart:
    """For HTML only; what it shows is in a table beside it or in the JSON."""

    drawing: Markup
    legend: list[Markup] = field(default_factory=list)
    caption: str = ""
    """What to look for; without the drawing there is nothing to say."""


@dataclass(frozen=True)
class Preformatted:
    text: str


@dataclass(frozen=True)
class Folded:
    """A table that is seen when it is asked for, and on no paper."""

    title: str
    table: Table


Item = str | Table | Chart | Preformatted | Folded


@dataclass(frozen=True)
class Section:
    title: str
    items: list[Item]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunPart:
    """One run's sections, under its name where there are several runs."""

    name: str
    headline: str
    figures: list[tuple[str, str]]
    sections: list[Section]
    problems: list[str]
    """All that the sections lack, which each names its own of."""


def table(columns: Sequence[tuple[str, Kind]], rows: Sequence[Sequence[str]], total: bool = False) -> Table:
    """A table without the columns that no row knows anything for; the first stays."""
    known = [i for i in range(len(columns)) if i == 0 or any(row[i] not in ("", UNKNOWN) for row in rows)]
    return Table([columns[i] for i in known], [[row[i] for i in known] for row in rows], total)


def legend(names: Iterable[str], palette: dict[str, str]) -> list[Markup]:
    return [Markup('<span class="key">{}{}</span>').format(svg.swatch(palette[name]), name) for name in ordered(names)]
