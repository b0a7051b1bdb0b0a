"""Kills and damage, on real ranks: what `docs/reliability.md` promises."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from faults import TARGETS, Victim
from test_checkpoints import World

from toolkit.run.folder import read_metrics

SAVE_EVERY = 3


def kill_and_compare(root: Path, kills: int, steps: int) -> list[str]:
    """Kill a run so often, finish it, and compare it with an undisturbed one; returns what each kill did."""
    world = World(root)
    arguments = world.arguments("unused", ["--config", "amcs_zero2"], 2, "--eval-every", "0")
    for flag, value in (("--steps", steps), ("--save-every", SAVE_EVERY)):
        arguments[arguments.index(flag) + 1] = str(value)
    at = arguments.index("--run-dir")
    del arguments[at : at + 2]
    victim = Victim(root / "killed", arguments, SAVE_EVERY, seed=int(os.environ.get("LEANSTATE_FAULT_SEED", "0")))
    said = []
    for number in range(kills):
        victim.kill_once()
        kill = victim.kills[-1]
        said.append(f"{number} {kill}, lost {kill.lost}")
        print(said[-1], flush=True)
        # The interval, and what was made of the next while the checkpoint at its beginning was being written.
        assert kill.lost < 2 * SAVE_EVERY, said[-1]
    victim.finish()
    plain = Victim(root / "plain", arguments, SAVE_EVERY)
    plain.finish()
    keys = ("step", "loss", "lr", "grad_norm", "alpha", "skipped")
    one, other = (
        [tuple(record[key] for key in keys) for record in read_metrics(run.folder / "metrics.jsonl")]
        for run in (victim, plain)
    )
    assert len(one) == steps and one == other
    return [json.dumps(Counter(kill.lost for kill in victim.kills))] + said


def test_a_few_kills_leave_the_curve_as_it_was(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, kills=4, steps=60)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills_leave_the_curve_as_it_was(tmp_path: Path) -> None:
    said = kill_and_compare(tmp_path, kills=100, steps=800)
    report = os.environ.get("LEANSTATE_FAULT_REPORT")
    if report:
        Path(report).write_text("\n".join(said) + "\n")
    for target in TARGETS:
        assert sum(target in line for line in said) >= 10
    assert sum("while_saving=True" in line for line in said) >= 10
