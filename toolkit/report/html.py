"""A report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from toolkit.report import svg
from toolkit.report.data import Report
from toolkit.report.elements import Chart, Folded, Preformatted, Table
from toolkit.report.outline import Outline, outline


def to_html(report: Report) -> str:
    """The page of `report`."""
    return page_html(outline(report))


def page_html(page: Outline) -> str:
    """`page` as HTML; every text from outside is escaped."""
    environment = Environment(
        loader=PackageLoader("toolkit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests |= {"table": _is(Table), "chart": _is(Chart), "preformatted": _is(Preformatted)}
    environment.tests["folded"] = _is(Folded)
    environment.filters["breakable"] = breakable
    swatches = {name: svg.swatch(colour) for name, colour in page.palette.items()}
    return environment.get_template("report.html.j2").render(page=page, swatches=swatches)


def breakable(text: str) -> Markup:
    """`text` with places to break a line after the joints of a path or a dotted name."""
    parts = Markup.escape(text)
    for joint in "./_:":
        parts = parts.replace(joint, Markup(f"{joint}<wbr>"))
    return parts


def _is(kind: type) -> Any:
    return lambda value: isinstance(value, kind)
