"""Every shipped config, as it is, starts two real ranks and trains on them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from ranks import case, run_ranks

from toolkit.config import load_config, shipped_configs

WORLD_SIZE, STEPS = 2, 16
NAMES = list(shipped_configs())
# Bytes per parameter over all ranks: 8-bit states with a scale per block and weights' remainders, or AdamW's two fp32
# states and its fp32 master weights.
STATES = {
    "AMCS": {"m_fast": 1 + 4 / 256, "m_slow": 1 + 4 / 256, "v": 1 + 4 / 256, "remainder": 1.0},
    "SOAM": {"m": 1 + 4 / 256, "v": 1 + 4 / 256, "remainder": 1.0},
    "AdamW": {"exp_avg": 4.0, "exp_avg_sq": 4.0, "master weights": 4.0},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By config, what each rank wrote: all in one start of the processes."""
    cases = {}
    for name in NAMES:
        config = load_config(name)
        batch = WORLD_SIZE * config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
        cases[name] = case(config, steps=STEPS, global_batch=batch)
    return run_ranks(tmp_path_factory.mktemp("shipped"), WORLD_SIZE, cases)


def test_there_is_a_config_for_every_optimizer_and_stage() -> None:
    ways = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    assert set(NAMES) == {f"{optimizer}_{way}" for optimizer in ("amcs", "soam", "adamw") for way in ways}


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    plain = runs[name.split("_")[0] + "_zero1"][0]
    for rank in runs[name]:
        losses = rank["losses"]
        assert all(math.isfinite(loss) for loss in losses)
        # Still in the warm-up, but already well beyond what batches differ by.
        assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.03
        # The same optimizer on the same batches, whatever is sharded or offloaded.
        assert losses == pytest.approx(plain["losses"], rel=2e-4)
        assert rank["skipped"] == 0
        if shipped_configs()[name].optimizer != "AdamW":
            assert rank["steps"] == [STEPS]
            first, last = rank["rates"][0], rank["rates"][-1]
            assert all(0 <= a < b for a, b in zip(first, last, strict=True)), "the schedule warms up"


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_holds_its_share_of_the_state(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    shipped = shipped_configs()[name]
    # Whole blocks on every rank: padding per group up to stage 2, per parameter at stage 3. The model of
    # this test is small (68,264 parameters), so that it shows.
    padding = 1.4 if shipped.stage == 3 else 1.1
    for rank in runs[name]:
        share = rank["parameters"] / WORLD_SIZE
        assert set(rank["state_bytes"]) == set(STATES[shipped.optimizer])
        for state, held in rank["state_bytes"].items():
            least = STATES[shipped.optimizer][state] * share
            assert least * 0.999 <= held <= least * padding, state
