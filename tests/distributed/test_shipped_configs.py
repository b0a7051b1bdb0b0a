"""Shipped configs start two real ranks and train on them.

Those of AMCS, SOAM, AdamW and AdamW8 as they are; other rules' without compiling, for a few steps of a smaller model.
`make test-slow` takes AdamW with offload, for which DeepSpeed builds an extension of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
from ranks import case, run_ranks

from toolkit.config import load_config, shipped_configs
from toolkit.optim import RULES

WORLD_SIZE, STEPS, FEW = 2, 16, 3
WHOLE = ("AMCS", "SOAM", "AdamW", "AdamW8")
SHIPPED = shipped_configs()
LEAN = [name for name, one in SHIPPED.items() if one.state_format == "lean"]
AS_THEY_ARE = [name for name, one in SHIPPED.items() if one.optimizer in WHOLE and name not in LEAN]
OTHERS = [name for name in SHIPPED if name not in AS_THEY_ARE + LEAN]
BUILT = ("adamw_zero2_offload", "adamw_zero3_offload")


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in BUILT else name for name in names]


def bytes_of_states(optimizer: str) -> dict[str, float]:
    """Bytes per parameter over all ranks: 8-bit states with a scale per block and weights' remainders, or AdamW's two
    fp32 states and its fp32 master weights."""
    if optimizer == "AdamW":
        return {"exp_avg": 4.0, "exp_avg_sq": 4.0, "master weights": 4.0}
    variants = RULES[optimizer].rule.variants({})
    everywhere = set.intersection(*({state.name for state in rule.states if state.of is None} for rule in variants))
    return dict.fromkeys(everywhere, 1 + 4 / 256) | {"remainder": 1.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """What each rank of a config wrote; all in one start of the processes, but those that take an extension."""
    folder = tmp_path_factory.mktemp("shipped")

    @functools.cache
    def start(built: bool) -> dict[str, list[dict[str, Any]]]:
        cases = {}
        for name in BUILT if built else [name for name in AS_THEY_ARE + OTHERS + LEAN if name not in BUILT]:
            config = load_config(name)
            batch = WORLD_SIZE * config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
            if name in OTHERS:
                config["optimizer"]["params"]["compile"] = False
            steps, layers = (FEW, 1) if name in OTHERS else (STEPS, 2)
            cases[name] = case(config, steps=steps, global_batch=batch, layers=layers)
        return run_ranks(folder / f"{built}", WORLD_SIZE, cases)

    return lambda name: start(name in BUILT)[name]


@pytest.mark.parametrize("name", marked(AS_THEY_ARE))
def test_it_trains(runs: Callable[[str], list[dict[str, Any]]], name: str) -> None:
    plain = runs(name.split("_")[0] + "_zero1")[0]
    for rank in runs(name):
        losses = rank["losses"]
        assert all(math.isfinite(loss) for loss in losses)
        # Still in the warm-up, but already well beyond what batches differ by.
        assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.03
        # The same optimizer on the same batches, whatever is sharded or offloaded.
        assert losses == pytest.approx(plain["losses"], rel=2e-4)
        assert rank["skipped"] == 0
        if SHIPPED[name].optimizer != "AdamW":
            assert_steps(rank, STEPS)


@pytest.mark.parametrize("name", LEAN)
def test_the_leanest_trains_as_well(runs: Callable[[str], list[dict[str, Any]]], name: str) -> None:
    plain = runs(name.removesuffix("_lean"))[0]
    for rank in runs(name):
        assert rank["losses"] == pytest.approx(plain["losses"], rel=0.02) and rank["skipped"] == 0
        assert_steps(rank, STEPS)
        assert sum(rank["state_bytes"].values()) < 0.4 * sum(plain["state_bytes"].values())


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_rules_step(runs: Callable[[str], list[dict[str, Any]]], name: str) -> None:
    for rank in runs(name):
        assert all(math.isfinite(loss) for loss in rank["losses"]) and rank["skipped"] == 0
        assert_steps(rank, FEW)


def assert_steps(rank: dict[str, Any], steps: int) -> None:
    assert rank["steps"] == [steps]
    first, last = rank["rates"][0], rank["rates"][-1]
    assert all(0 <= a < b for a, b in zip(first, last, strict=True)), "the schedule warms up"


@pytest.mark.parametrize("name", marked(AS_THEY_ARE + OTHERS))
def test_each_rank_holds_its_share_of_the_state(runs: Callable[[str], list[dict[str, Any]]], name: str) -> None:
    shipped = SHIPPED[name]
    states = bytes_of_states(shipped.optimizer)
    # Whole blocks on every rank: padding per group up to stage 2, per parameter at stage 3. The model of
    # this test is small (68,264 parameters), so that it shows.
    padding = 1.4 if shipped.stage == 3 else 1.1
    for rank in runs(name):
        share = rank["parameters"] / WORLD_SIZE
        assert states.keys() <= rank["state_bytes"].keys()
        for state in rank["state_bytes"].keys() - states.keys():  # of rows and columns, or of some parameters only
            assert 0 < rank["state_bytes"][state] < share
        for state, bytes_each in states.items():
            assert bytes_each * share * 0.999 <= rank["state_bytes"][state] <= bytes_each * share * padding, state
