"""The tables of methods in the docs are those of the losses that are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from methods_losses import KEPT, TABLES, add, rows, rows_of_few, rows_of_states, rows_of_warmups


def report(
    name: str, losses: dict[str, float], lr: float = 1e-3, others: Mapping[str, float | None] | None = None
) -> Any:
    sweep = {"losses": {f"{lr:g}": losses.get("0"), **(others or {})}}
    about = {"peak": 2e6, "state_per_parameter": 3.0, "sweeps": [sweep] if others else []}
    return {
        "methods": [
            {"name": name, "best": {"lr": lr}, "losses": losses, **about},
            {"name": "not yet", "best": {}, "losses": {}},
        ]
    }


@pytest.mark.parametrize(("heading", "made"), TABLES)
def test_the_tables_in_the_docs_are_those_of_the_kept_losses(heading: str, made: Any) -> None:
    page = (KEPT.parent / "README.md").read_text(encoding="utf-8").splitlines()
    at = page.index(f"| {heading} |") + 2
    wanted = made(json.loads(KEPT.read_text()))
    assert len(wanted) > 3
    assert page[at : at + len(wanted)] == wanted and not page[at + len(wanted)].startswith("|")


def test_differences_are_paired_and_only_like_runs_are_put_together() -> None:
    kept: dict[str, Any] = {}
    add(kept, report("adamw", {"0": 5.0, "1": 4.0, "2": 4.5}), "here")
    add(kept, report("adamw8", {"1": 3.5}, others={"0.0005": 4.9, "0.004": None}), "here")
    assert rows_of_few(kept) == ["| adamw8 | -0.500 | 1 | 0.001 |"]
    add(kept, report("adamw8", {"0": 4.7, "2": 4.1}, others={"0.002": 5.25}), "here")
    add(kept, report("adamw8-fp32", {"0": 4.6, "1": 3.5, "2": 4.2}), "here")
    assert rows(kept) == [
        "| adamw8 | -0.400 ± 0.058 | -0.9 | 4.100 ± 0.600 | 0.001 | +0.200, +0.550 | 2.00 | 3.00 |",
        "| adamw |  |  | 4.500 ± 0.500 | 0.001 | not tried, not tried | 2.00 | 3.00 |",
    ]
    assert rows_of_few(kept) == []
    assert rows_of_states(kept) == ["| AdamW8 | 4.1000 | 4.1000 | +0.0000 | 0.1155 | +0.1000, +0.0000, -0.1000 |"]
    add(kept, report("adamw-warmup160", {"0": 4.8, "1": 3.9, "2": 4.2}), "here")
    add(kept, report("adamw8-warmup13", {"0": 5.1}), "here")
    assert len(rows(kept)) == 2 and rows_of_few(kept) == []
    assert rows_of_warmups(kept) == [
        "| adamw8 | 5.100 |  | 4.700 |  |  |  | -0.200 ± 0.100 | -0.5 | 3 |",
        "| adamw |  |  | 5.000 | 4.800 |  |  |  |  | 3 |",
    ]
    with pytest.raises(SystemExit, match="at lr 0.001, and these are at 0.002"):
        add(kept, report("adamw8", {"0": 4.0}, lr=2e-3), "here")
    with pytest.raises(SystemExit, match="of here, and these are of there"):
        add(kept, report("adamw8", {"0": 4.0}), "there")
