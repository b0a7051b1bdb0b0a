"""`toolkit bench train`: which runs are made, in which order, and what is made of their times."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    assert own.counted == {"speed_ratio": 2, "peak_bytes": 2}, "no MFU where the device's peak is not known"
    assert found.notes[0].startswith("3 rounds only: speed is a median of fewer than 7 ratios")
    assert own.timed["tokens_per_s"].median == 8 * 2 * 3 * 2 / 0.5 and own.timed["step_seconds"].samples == 9


def test_a_compiled_model_is_measured_beside_the_same_that_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[str, bool]] = []

    def finished(runs: Any, name: str, number: int, threads: int) -> runs_in_turn.Finished:
        line = runs.options(Cell(name, (), number)) if name != "hf-trainer" else []
        made.append((name, "--compile-model" in line))
        return runs_in_turn.Finished([0.5], peak=number, mfu_of_a_token=0.01)

    monkeypatch.setattr(runs_in_turn, "_own_run", finished)
    monkeypatch.setattr(runs_in_turn, "_trainer_run", finished)
    settings: dict[str, Any] = {"seq_len": 8, "micro_batch": 2, "grad_accum": 1, "compile_model": True}
    [trainer, amcs] = read_methods(["adamw,amcs"], [], 2, [])
    order = ["hf-trainer", "amcs"]
    options = (settings, 1, 1, 1, "hf-trainer", tmp_path)
    found = runs_in_turn.measure([amcs], trainer, order, *options, say=lambda words: None)
    assert made == [("hf-trainer", False), ("amcs", False), ("amcs", True)]
    assert [row.name for row in found.rows] == ["hf-trainer", "amcs", "amcs, compiled"]
    assert all(row.counted["mfu"] == pytest.approx(0.01 * 8 * 2 / 0.5) for row in found.rows)


def test_enough_rounds_need_no_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs_in_turn, "_own_run", lambda *_: runs_in_turn.Finished([1.0], peak=1))
    settings: dict[str, Any] = {"seq_len": 8, "micro_batch": 2, "grad_accum": 1}
    options = (["amcs"], settings, 1, 1, 7, "amcs", tmp_path)
    assert runs_in_turn.measure(read_methods(["amcs"], [], 2, []), None, *options, say=lambda words: None).notes == []


def test_a_run_is_timed_from_the_end_of_a_step_to_the_next_as_the_trainer_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a run does between its steps (metrics, screen, monitors) counts; a run's own `step_time_s` leaves it out."""

    def finish(command: Sequence[str], threads: int, log: Path, name: str) -> None:
        folder = Path(next(part for part in command if part.startswith("--run-dir=")).partition("=")[2])
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"peak_memory_bytes": 5}))
        line = {"loss": 1.0, "skipped": False, "tokens_per_s": 8.0, "step_time_s": 2.0, "mfu": 0.4}
        lines = [line | {"step": step} | ({"between_s": step / 8} if step > 1 else {}) for step in range(1, 6)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(runs_in_turn, "finish", finish)
    settings: dict[str, Any] = {"seq_len": 8, "micro_batch": 2, "grad_accum": 1}
    options = (["amcs"], settings, 1, 1, 1, "amcs", tmp_path)
    found = runs_in_turn.measure(read_methods(["amcs"], [], 2, []), None, *options, say=lambda words: None)
    seconds = found.rows[0].timed["step_seconds"]
    assert (seconds.lower, seconds.median, seconds.upper) == (2.53125, 2.5625, 2.59375)
    assert found.rows[0].counted["mfu"] == pytest.approx(0.4 / 8 * 16 * (1 / 2.5 + 1 / 2.625) / 2)
