"""Links between the pages lead somewhere, and tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from toolkit.state.codecs import FORMATS, MIXES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def prose(page: Path) -> str:
    """A page without code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)


def links(page: Path) -> list[str]:
    """Those to pages and files here."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not re.match(r"\w+:", link)]


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link, as GitHub has it."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        same = sum(1 for one in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", one))
        found.add(f"{name}-{same}" if same else name)
    return found


def broken(page: Path) -> list[str]:
    found = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            found.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    assert [page.name for page in index.parent.glob("*.md") if page not in linked and page != index] == []


def row(page: str, option: str) -> str:
    """Of a table of `page`: the line of `option`."""
    return next(line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith(f"| `{option}"))


def test_state_formats_are_all_named_where_they_are_chosen() -> None:
    known = row("optimizers/README.md", "state_format")
    assert [name for name in (*FORMATS, *MIXES) if f'"{name}"' not in known] == []
    choices = re.search(r"Literal\[([^]]*)\]", (ROOT / "toolkit" / "commands" / "fits.py").read_text())
    assert choices is not None
    offered = [name for name in re.findall(r'"(\w+)"', choices[1]) if name != "8bit"]
    line = row("estimate.md", "--state-format")
    assert len(offered) > 3 and [name for name in offered if not re.search(rf"\b{name}\b", line)] == []
