"""The table of more methods in the docs is that of the losses that are kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from methods_losses import HEADING, KEPT, add, rows


def report(name: str, losses: dict[str, float], lr: float = 1e-3) -> dict[str, Any]:
    return {
        "methods": [
            {"name": name, "best": {"lr": lr}, "losses": losses, "peak": 2e6, "state_per_parameter": 3.0},
            {"name": "not yet", "best": {}, "losses": {}},
        ]
    }


def test_the_table_in_the_docs_is_that_of_the_kept_losses() -> None:
    page = (KEPT.parent / "README.md").read_text(encoding="utf-8").splitlines()
    at = page.index(f"| {HEADING} |") + 2
    wanted = rows(json.loads(KEPT.read_text()))
    assert page[at : at + len(wanted)] == wanted and not page[at + len(wanted)].startswith("|")


def test_differences_are_paired_and_only_like_runs_are_put_together() -> None:
    kept: dict[str, Any] = {}
    add(kept, report("adamw", {"0": 5.0, "1": 4.0}), "here")
    add(kept, report("other", {"1": 3.5}), "here")
    add(kept, report("other", {"0": 4.7, "2": 1.0}), "here")
    assert rows(kept) == [
        "| other | -0.400 ± 0.100 | 2 | 3.0667 | 2.00 | 3.00 | 0.001 |",
        "| adamw |  | 2 | 4.5000 | 2.00 | 3.00 | 0.001 |",
    ]
    with pytest.raises(SystemExit, match="at lr 0.001, and these are at 0.002"):
        add(kept, report("other", {"0": 4.0}, lr=2e-3), "here")
    with pytest.raises(SystemExit, match="of here, and these are of there"):
        add(kept, report("other", {"0": 4.0}), "there")
