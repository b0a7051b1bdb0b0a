"""`toolkit bench train`: which runs are made, in which order, and what is made of their times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from toolkit.bench import train as runs_in_turn
from toolkit.compare.methods import read_methods
from toolkit.compare.runs import Cell


def test_processes_alternate_and_ratios_are_those_of_a_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both slow down fourfold in the second round."""
    made: list[str] = []
    kept: list[list[int]] = []

    def finished(runs: Any, name: str, number: int, threads: int) -> runs_in_turn.Finished:
        made.append(f"{name}{number}")
        base = (1.0 if name == "adamw" else 0.5) * (4.0 if number == 1 else 1.0)
        return runs_in_turn.Finished([base, base, base], peak=number)

    monkeypatch.setattr(runs_in_turn, "_own_run", finished)
    settings: dict[str, Any] = {"seq_len": 8, "micro_batch": 2, "grad_accum": 3}
    methods = read_methods(["adamw,amcs"], [], 2, [])
    found = runs_in_turn.measure(
        methods,
        None,
        ["adamw", "amcs"],
        settings,
        *(2, 1, 3, "adamw", tmp_path),
        say=lambda words: None,
        keep=lambda found: kept.append([row.timed["step_seconds"].samples for row in found.rows]),
    )
    assert kept == [[3, 3], [6, 6], [9, 9]]
    assert made == ["adamw0", "amcs0", "adamw1", "amcs1", "adamw2", "amcs2"]
    own = found.rows[1]
    assert own.counted == {"speed_ratio": 2, "peak_bytes": 2}
    assert own.timed["tokens_per_s"].median == 8 * 2 * 3 * 2 / 0.5 and own.timed["step_seconds"].samples == 9


def test_a_compiled_model_is_measured_beside_the_same_that_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[str, bool]] = []

    def finished(runs: Any, name: str, number: int, threads: int) -> runs_in_turn.Finished:
        line = runs.options(Cell(name, (), number)) if name != "hf-trainer" else []
        made.append((name, "--compile-model" in line))
        return runs_in_turn.Finished([1.0], peak=number)

    monkeypatch.setattr(runs_in_turn, "_own_run", finished)
    monkeypatch.setattr(runs_in_turn, "_trainer_run", finished)
    settings: dict[str, Any] = {"seq_len": 8, "micro_batch": 2, "grad_accum": 1, "compile_model": True}
    [trainer, amcs] = read_methods(["adamw,amcs"], [], 2, [])
    order = ["hf-trainer", "amcs"]
    options = (settings, 1, 1, 1, "hf-trainer", tmp_path)
    found = runs_in_turn.measure([amcs], trainer, order, *options, say=lambda words: None)
    assert made == [("hf-trainer", False), ("amcs", False), ("amcs", True)]
    assert [row.name for row in found.rows] == ["hf-trainer", "amcs", "amcs, compiled"]
