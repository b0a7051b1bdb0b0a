"""`toolkit report`: what runs took and why."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from toolkit.console import waiting
from toolkit.errors import UserError
from toolkit.plugins import Plugins, import_plugins
from toolkit.printable import echo


class ReportFormat(StrEnum):
    HTML = "html"
    MARKDOWN = "markdown"
    JSON = "json"
    ALL = "all"


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; the first is what others are compared with.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="A folder, or a file where it is one format. (default: the first run's folder)")
    ] = None,
    formats: Annotated[
        list[ReportFormat] | None,
        typer.Option("--format", metavar="html|markdown|json|all", help="What to write; repeatable. (default: all)"),
    ] = None,
    plugins: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON; no file is written.")] = False,
) -> None:
    """Report what runs took and why: a page, Markdown and JSON.

    \b
    toolkit report runs/first
    toolkit report runs/first runs/second --out side-by-side.html
    toolkit report runs/first --json
    """
    from toolkit.report import build_report, render, report_paths, write_report

    import_plugins(plugins)
    if as_json:
        if out is not None or formats:
            raise UserError("--json prints the report: leave --out and --format out, which say what is written.")
        with waiting("reading the runs"):
            built = build_report(runs)
        typer.echo(render(built, "json"), nl=False)
        return
    paths = report_paths(runs, out, () if formats is None or ReportFormat.ALL in formats else formats)
    with waiting("reading the runs"):
        built = build_report(runs)
        write_report(built, paths)
    echo(built.headline)
    for gap in built.gaps:
        echo(f"not like for like: {gap}")
    for run in built.runs:
        for problem in run.problems:
            echo(f"{run.name}: {problem.sentence}")
    for path in paths.values():
        echo(f"written: {path}")
