"""A comparison whose runs have two ranks each, one and two of them at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_compare_runs import STEPS, command, interrupt, losses, resume, run


@pytest.mark.slow
def test_two_methods_on_two_ranks_one_and_two_at_a_time(tmp_path: Path) -> None:
    plan = ["--methods", "adamw8,muon8", "--ranks", "2", "--set", "optimizer.params.compile=false"]
    interrupt(tmp_path, *plan, "--seeds", "1")
    [(place, cut)] = losses(tmp_path).items()
    first = resume(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    made = losses(tmp_path)
    assert made[place][: len(cut)] == cut, "what was made before the interruption stays"
    assert len(made) == 2 and {len(values) for values in made.values()} == {STEPS}

    extended = run(tmp_path, *plan, "--seeds", "2", "--jobs", "2")
    assert extended.returncode == 0, extended.stdout + extended.stderr
    assert extended.stdout.count("started: ") == 2, "nothing that has ended is made again"
    again = losses(tmp_path)
    assert len(again) == 4 and {len(values) for values in again.values()} == {STEPS}
    assert all(again[place] == values for place, values in made.items())
    for seed in (0, 1):
        begun = {values[0] for place, values in again.items() if place.endswith(f"seed{seed}")}
        assert len(begun) == 1, "every method begins with the same weights and the same batch"

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    adamw, muon = report["methods"]
    # Two ranks share the state: AdamW's two bytes a parameter are one on each.
    assert muon["state_per_parameter"] > 0 and adamw["state_per_parameter"] < 4.5
    assert "--num_gpus 2" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_what_is_wrong_is_one_sentence_beside_all_that_the_launcher_says(tmp_path: Path) -> None:
    command(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    wrong = run(tmp_path, "--methods", "amcs", "--ranks", "2", "--data", str(tmp_path / "empty.txt"))
    assert wrong.returncode == 2 and wrong.stderr.count("error: ") == 1 and "empty.txt" in wrong.stderr
