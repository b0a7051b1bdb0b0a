"""Scales and an alpha that follow what is measured: the same at 1 and 2 ranks and every stage, and after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_worker import carry
from plugins_worker import Model, gradients, train
from ranks import launch
from scaled_references import adam, agreement, amcs, follow_dynamic
from test_plugin_checkpoints import World as Folder
from test_plugins import COMPONENTS, STEPS

from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.commands.checkpoint import find
from toolkit.records.run import read_metrics

WORKER = Path(__file__).with_name("scales_worker.py")
TOTAL, STOP, LR, DECAY = 4, 2, 1e-2, 0.1
STAGES = (1, 3)
DIRECTIONS: dict[str, Any] = {
    "AdamW8": lambda: adam(0.9, 0.95),
    "AMCS": lambda: amcs(agreement),
}
OPTIONS: dict[str, dict[str, Any]] = {"AdamW8": {}, "AMCS": {"alpha": "agreement"}}


def case(rule: str, stage: int) -> dict[str, Any]:
    params = {"lr": LR, "weight_decay": DECAY, "state_format": "fp32", "compile": False, "component_scales": "dynamic"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": rule, "params": params | OPTIONS[rule]},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000},
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000,
    }
    return {"config": config, "steps": STEPS, "same": False, "warm": False}


class World(Folder):
    """Beside the folder of the tests what its launches gave, by rule and stage."""

    two: dict[tuple[str, int], Any]
    one: dict[tuple[str, int], Any]


def arguments(world: World, run: str, stage: int, ranks: int) -> list[str]:
    return world.arguments(run, "AMCS", stage, ranks, steps=TOTAL, component_scales="dynamic")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> Iterator[World]:
    """Two ranks in one launch: a run, the same with a stop, and each rule on known gradients; one rank is this one."""
    made = World(tmp_path_factory.mktemp("scales"))
    cases = [(rule, stage) for rule in DIRECTIONS for stage in STAGES]
    cut = arguments(made, "cut", 2, 2)
    steps: list[dict[str, Any]] = [{"run": arguments(made, "plain", 2, 2)}, {"run": cut, "stop_at": STOP}, {"run": cut}]
    found = launch(made.root / "two", 2, WORKER, {"steps": steps + [{"case": case(*each)} for each in cases]})
    made.two = dict(zip(cases, found[0][len(steps) :], strict=True))
    made.one = {each: train(case(*each)) for each in cases}
    yield made


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rule", DIRECTIONS)
def test_they_follow_their_equations_at_every_stage(world: World, rule: str, stage: int) -> None:
    start = {name: p.detach().double().numpy() for name, p in Model().named_parameters()}
    components = {name: COMPONENTS[name.split(".")[0]] for name in start}
    for ranks, found in ((1, world.one), (2, world.two)):
        seen = [
            {
                name: np.mean([gradients(step, rank)[name].double().numpy() for rank in range(ranks)], axis=0)
                for name in start
            }
            for step in range(STEPS)
        ]
        decay = {name: DECAY if x.ndim > 1 else 0.0 for name, x in start.items()}
        want, gamma = follow_dynamic(DIRECTIONS[rule](), LR, start, seen, components, decay.__getitem__)
        assert len({round(value, 6) for value in gamma.values()}) > 1
        got = found[rule, stage]
        for name, value in want.items():
            moved = np.linalg.norm(value - start[name])
            assert np.linalg.norm(got["weights"][name].double().numpy() - value) < 1e-5 * moved, name
        logs = torch.cat([held["log_scale"] for held in got["small"]]).exp()
        assert len(logs) == len(start)
        assert sorted(set(logs.tolist())) == pytest.approx(sorted(gamma.values()), rel=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(world: World) -> None:
    plain, cut = (read_metrics(world.root / name / "metrics.jsonl") for name in ("plain", "cut"))
    assert [record["step"] for record in cut] == list(range(1, TOTAL + 1))
    scales = [f"scale_{name}" for name in ("embedding", "attention", "ffn", "norm", "head")]
    for key in ("loss", "alpha", *scales):
        assert [record[key] for record in cut] == [record[key] for record in plain], key
    assert all(plain[-1][key] != 1.0 for key in scales), "each has moved; what is at the bound has moved alike"
    assert world.digest("plain") == world.digest("cut")


def test_other_ranks_and_stages_keep_them(world: World) -> None:
    """2 ranks at stage 2 -> 1 at stage 3, through an engine -> 2 at stage 1."""
    assert carry(arguments(world, "unused", 3, 1), str(world.root / "plain"), str(world.root / "one")) == []
    convert(open_checkpoint(find(world.root / "one")), world.root / "two-1", stage=1, world_size=2)
    assert world.digest("plain") == world.digest("one") == world.digest("two-1")
    source = open_checkpoint(find(world.root / "two-1"))
    held = {name: source.small(name)["log_scale"] for name in source.sharding.by_name}
    assert all(value.shape == (1,) and value.abs() > 0 for value in held.values())
