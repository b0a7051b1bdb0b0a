"""`--lr auto`: the rate that the range test finds is all that it leaves behind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_checkpoints import EXACT, WAYS, World, steps_of

RATES = 28
"""A quarter of the usual: steps take time."""


@pytest.fixture(scope="module", params=["amcs-3", pytest.param("adamw-2", marks=pytest.mark.slow)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, name: str) -> World:
    """On two ranks: a run that finds its rate, stopped and resumed; then the same with that rate given."""
    world = World(tmp_path_factory.mktemp("rates"))
    auto = world.arguments(f"{name}/auto", WAYS[name], 2, "--lr", "auto")
    steps = [{"run": auto, "rates": RATES, "stop_at": 3}, {"run": auto}]
    world.results = steps_of(world, "auto", 2, steps)  # type: ignore[attr-defined]
    given = world.arguments(f"{name}/given", WAYS[name], 2, "--lr", repr(noted(world, name)["lr"]))
    steps_of(world, "given", 2, [{"run": given}])
    return world


def facts(world: World, run: str) -> dict[str, Any]:
    return dict(json.loads((world.root / run / "run.json").read_text()))


def noted(world: World, name: str) -> dict[str, Any]:
    return dict(facts(world, f"{name}/auto")["lr_range_test"])


def exact(world: World, run: str) -> list[dict[str, Any]]:
    return [{key: record.get(key) for key in EXACT} for record in world.records(run)]


def test_a_run_that_found_its_rate_is_the_run_with_that_rate(world: World, name: str) -> None:
    assert exact(world, f"{name}/auto") == exact(world, f"{name}/given")
    assert world.digest(f"{name}/auto") == world.digest(f"{name}/given")
    configs = [json.loads((world.root / name / run / "ds_config.json").read_text()) for run in ("auto", "given")]
    assert configs[0] == configs[1] and configs[0]["optimizer"]["params"]["lr"] == noted(world, name)["lr"]


def test_the_test_is_noted_and_said(world: World, name: str) -> None:
    found = noted(world, name)
    assert found["rates"] == sorted(found["rates"]) and len(found["rates"]) == len(found["losses"]) > 8
    assert found["rates"][0] < found["lr"] < found["rates"][-1] and found["seconds"] > 0
    [line] = [one for one in world.results[0]["said"].splitlines() if "found in" in one]  # type: ignore[attr-defined]
    assert f"--lr auto: {found['lr']:.2e}, found in" in line and f"{len(found['rates'])} steps" in line
    assert facts(world, f"{name}/auto")["settings"]["lr"] == "auto"


def test_a_resumed_run_keeps_the_rate(world: World) -> None:
    said = world.results[-1]["said"]  # type: ignore[attr-defined]
    assert "testing" not in said and "taken from the checkpoint: --lr" in said
