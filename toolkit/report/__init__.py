"""What a run took and why, after it ran: one data model, written as an HTML page, Markdown and JSON."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from toolkit.errors import UserError
from toolkit.paths import check_writable
from toolkit.report.compare import build_report
from toolkit.report.data import Report

__all__ = ["SUFFIXES", "Report", "build_report", "render", "report_paths", "write_report"]

SUFFIXES = {"html": ".html", "markdown": ".md", "json": ".json"}
"""The file suffix of each format."""
_SPELLINGS = {".html": "html", ".htm": "html", ".md": "markdown", ".markdown": "markdown", ".json": "json"}
_OURS = {"html": " – memory report</title>", "markdown": "\n\nleanstate ", "json": '{\n "title": '}
"""What every report of a format holds, and no other file that a run writes."""


def render(report: Report, kind: str) -> str:
    """`report` as the text of a file; `kind` is a key of SUFFIXES."""
    if kind == "json":
        return report.model_dump_json(indent=1) + "\n"
    if kind == "markdown":
        from toolkit.report.markdown import to_markdown

        return to_markdown(report)
    from toolkit.report.html import to_html

    return to_html(report)


def report_paths(runs: Sequence[Path], out: Path | None, kinds: Collection[str]) -> dict[str, Path]:
    """Where each format goes: to report.html, .md and .json in folder `out` (None: the first run's), or to file `out`.

    Args:
        kinds: keys of SUFFIXES; none means all of them, or the one that `out` names by its suffix.

    Raises:
        UserError: `out` is a file of one format, and others are asked for; or of a format that no report has.
    """
    if out is None or out.is_dir() or not re.fullmatch(r"\.[A-Za-z]\w{0,9}", out.suffix):
        return {kind: (out or runs[0]) / f"report{end}" for kind, end in SUFFIXES.items() if not kinds or kind in kinds}
    named = _SPELLINGS.get(out.suffix.lower())
    if named is None:
        raise UserError(
            f"--out {out}: a report is an .html, .md or .json file, no {out.suffix}; give a file of one of these, or a "
            "folder (one whose name has a dot must be there already)."
        )
    if kinds and set(kinds) != {named}:
        asked = ", ".join(kind for kind in SUFFIXES if kind in kinds)
        raise UserError(f"--out {out} is a file for {named}, but --format asks for {asked}; give a folder.")
    return {named: out}


def write_report(report: Report, paths: dict[str, Path]) -> None:
    """Write `report` to `paths` (by format), making folders as needed, over older reports and over nothing else.

    Raises:
        UserError: a file cannot be written, or is there and no report; then none is written.
    """
    for kind, path in paths.items():
        check_writable(path)
        if not _may_be_replaced(path, kind):
            raise UserError(f"{path} is there already and is no report; give another --out.")
    for kind, path in paths.items():
        text = render(report, kind)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"the report {path} cannot be written: {error.strerror}.") from None


def _may_be_replaced(path: Path, kind: str) -> bool:
    try:
        return not path.exists() or (path.is_file() and _OURS[kind] in path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
