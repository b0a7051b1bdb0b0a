"""A report as Markdown: the outline without its charts."""

from __future__ import annotations

import re

from toolkit.report.data import Report
from toolkit.report.elements import Folded, Preformatted, RunPart, Section, Table
from toolkit.report.outline import Outline, outline

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~&])")


def to_markdown(report: Report) -> str:
    """`report` as Markdown."""
    return page_markdown(outline(report))


def page_markdown(page: Outline) -> str:
    """GitHub's Markdown, with names from outside escaped."""
    blocks = [f"# {escaped(page.title)}", escaped(page.headline)]
    if page.gaps:
        blocks += [f"**{page.gaps_title}:**", "\n".join(f"* {escaped(gap)}" for gap in page.gaps)]
    for section in page.comparison:
        blocks += _section(section, "##")
    alone = len(page.runs) == 1
    for run in page.runs:
        blocks += _run(run, alone)
    blocks.append(f"leanstate {page.leanstate}")
    return "\n\n".join(blocks) + "\n"


def escaped(text: str) -> str:
    """`text` on one line, with what Markdown or HTML would read as markup escaped."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _run(run: RunPart, alone: bool) -> list[str]:
    blocks = [] if alone else [f"## {escaped(run.name)}", escaped(run.headline)]
    for section in run.sections:
        blocks += _section(section, "##" if alone else "###")
    return blocks


def _section(section: Section, level: str) -> list[str]:
    blocks = [f"{level} {section.title}"]
    blocks += [f"> {escaped(problem)}" for problem in section.problems]
    for item in section.items:
        if isinstance(item, str):
            blocks.append(escaped(item))
        elif isinstance(item, Table):
            blocks.append(_table(item))
        elif isinstance(item, Folded):
            blocks.append(f"{escaped(item.title)} are not shown here.")
        elif isinstance(item, Preformatted):
            blocks.append("\n".join(f"    {line}" for line in item.text.splitlines()))
    return blocks


def _table(table: Table) -> str:
    kinds = [kind for _, kind in table.columns]
    rows = [[title for title, _ in table.columns], ["--:" if kind == "number" else "---" for kind in kinds]]
    lines = ["| " + " | ".join(escaped(title) for title in rows[0]) + " |", "|" + "|".join(rows[1]) + "|"]
    for index, row in enumerate(table.rows):
        cells = [escaped(cell) for cell in row]
        if table.total and index == len(table.rows) - 1:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
