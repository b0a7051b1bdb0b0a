"""What a part has to work with: where it runs, at what size, and the file that its figures go into as they come."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring.parts import BY_NAME, Part

REPOSITORY = Path(__file__).resolve().parents[3]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a run that is cut off leaves the file of a moment before."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


@dataclass
class Recorder:
    """The figures of one part, kept in `file`.

    `rehearse`: on the CPU and at toy size, so that the script is tested where there is no GPU; what only a GPU has
    stays unmeasured. `folder`: empty, for what the part writes.
    """

    name: str
    file: Path
    folder: Path
    rehearse: bool
    figures: dict[str, float] = field(default_factory=dict)
    tables: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def part(self) -> Part:
        return BY_NAME[self.name]

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def set(self, **figures: float) -> None:
        """Keep figures by the key of their check."""
        known = {check.key for check in self.part.checks}
        assert figures.keys() <= known, (figures.keys() - known, self.name)
        self.figures |= {key: float(value) for key, value in figures.items()}
        self.save()

    def row(self, table: str, row: str, **cells: float) -> None:
        """Keep cells of a row by the heading of their column (`**{"134M, ms": 1.0}`)."""
        known = next(item for item in self.part.tables if item.key == table)
        assert row in known.rows and cells.keys() <= set(known.columns), (table, row, cells)
        self.tables.setdefault(table, {}).setdefault(row, {}).update({k: float(v) for k, v in cells.items()})
        self.save()

    def note(self, words: str) -> None:
        """Something that the page should say of this part."""
        self.notes.append(words)
        self.save()

    def save(self) -> None:
        write_json(self.file, {"figures": self.figures, "tables": self.tables, "notes": self.notes})


def verdict(part: Part, figures: dict[str, float]) -> str:
    """ "passed", or "failed" where a figure that has a bound is missing or beyond it."""
    bounded = [check for check in part.checks if check.bound is not None]
    return "passed" if all(check.passes(figures.get(check.key)) for check in bounded) else "failed"


def stated(part: Part, figures: dict[str, float]) -> list[dict[str, Any]]:
    """What was measured, its target and whether it is reached, for who reads the JSON alone."""
    return [
        {
            "what": check.words,
            "measured": figures.get(check.key),
            "unit": check.unit,
            "target": check.target or None,
            "passed": check.passes(figures.get(check.key)),
        }
        for check in part.checks
    ]
