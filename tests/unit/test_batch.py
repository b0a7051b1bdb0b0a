"""Batch arithmetic, and what flags write into the JSON."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch, resolve_batch
from toolkit.errors import UserError
from toolkit.run.merge import merge_flags
from toolkit.run.settings import RunSettings

JSON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AMCS", "params": {"lr": 6e-4}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 640, "warmup_num_steps": 64, "warmup_type": "linear"},
    },
}
SMALL = st.integers(1, 64)


# Batch arithmetic


@given(micro=SMALL, accumulation=SMALL, world=SMALL, missing=st.sampled_from([MICRO, ACCUMULATION, GLOBAL, None]))
def test_any_two_flags_give_the_third(micro: int, accumulation: int, world: int, missing: str | None) -> None:
    expected = Batch(micro, accumulation, world)
    flags: dict[str, int | None] = {MICRO: micro, ACCUMULATION: accumulation, GLOBAL: expected.total}
    if missing is not None:
        flags[missing] = None
    assert resolve_batch(flags, {"train_micro_batch_size_per_gpu": 3, "train_batch_size": 999}, world) == expected
    in_json = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    assert resolve_batch({}, {**in_json, "train_batch_size": expected.total}, world) == expected


@given(micro=SMALL, accumulation=SMALL, world=SMALL, total=st.integers(1, 4096))
def test_a_batch_that_does_not_multiply_is_refused(micro: int, accumulation: int, world: int, total: int) -> None:
    flags = {MICRO: micro, ACCUMULATION: accumulation, GLOBAL: total}
    if micro * accumulation * world == total:
        assert resolve_batch(flags, {}, world).total == total
        return
    with pytest.raises(UserError) as caught:
        resolve_batch(flags, {}, world)
    product = f"micro-batch {micro} * gradient accumulation {accumulation} * world size {world}"
    assert f"{product} = {micro * accumulation * world}, but the global batch is {total}." in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "config", "world", "expected"),
    [
        # A flag and the shipped JSON (micro-batch 4, accumulation 1).
        ({GLOBAL: 128}, JSON, 2, Batch(4, 16, 2)),
        # A micro-batch of the JSON gives way, one that is typed does not.
        ({GLOBAL: 4}, JSON, 2, Batch(2, 1, 2)),
        ({GLOBAL: 12}, JSON, 2, Batch(3, 2, 2)),
        ({GLOBAL: 10}, JSON, 2, Batch(1, 5, 2)),
        ({MICRO: 8}, JSON, 2, Batch(8, 1, 2)),
        ({ACCUMULATION: 3}, JSON, 2, Batch(4, 3, 2)),
        # A JSON that fixes the global batch keeps it.
        ({MICRO: 2}, {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}, 2, Batch(2, 4, 2)),
        ({ACCUMULATION: 2}, {"train_batch_size": 16}, 2, Batch(4, 2, 2)),
        ({}, {"train_batch_size": 16}, 2, Batch(8, 1, 2)),
        ({}, {"train_batch_size": 16, "train_micro_batch_size_per_gpu": "auto"}, 4, Batch(4, 1, 4)),
        ({}, {"train_micro_batch_size_per_gpu": 5}, 3, Batch(5, 1, 3)),
    ],
)
def test_flags_and_json_give_a_batch(
    flags: dict[str, int | None], config: dict[str, Any], world: int, expected: Batch
) -> None:
    assert resolve_batch(flags, config, world) == expected


@pytest.mark.parametrize(
    ("flags", "config", "message"),
    [
        ({GLOBAL: 10, MICRO: 4}, JSON, "micro-batch 4 * world size 2 = 8; nearest that fit: 8 or 16."),
        ({GLOBAL: 9}, JSON, "9 is not a multiple of world size 2; nearest that fit: 8 or 10."),
        ({GLOBAL: 3, ACCUMULATION: 2}, {}, "gradient accumulation 2 * world size 2 = 4; nearest that fits: 4."),
        ({}, {}, "the batch size is not given"),
        ({ACCUMULATION: 2}, {}, "the batch size is not given"),
        ({MICRO: 10**20}, {}, f"the micro-batch is {10**20}, but it must be at most 1048576."),
        ({}, {"train_batch_size": 2.5}, "train_batch_size is 2.5"),
        ({}, {"train_batch_size": True}, "train_batch_size is True"),
        ({}, {"gradient_accumulation_steps": 0, "train_batch_size": 4}, "gradient_accumulation_steps is 0"),
    ],
)
def test_impossible_batches(flags: dict[str, int | None], config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        resolve_batch(flags, config, 2)
    assert message in str(caught.value)


# Flags written into the JSON


def test_flags_are_written_into_a_copy_of_the_json() -> None:
    before = copy.deepcopy(JSON)
    settings = RunSettings(steps=100, global_batch=32, lr=1e-3, warmup=0.25)
    merged, batch, remarks = merge_flags(JSON, settings, world_size=2)
    assert before == JSON
    assert batch == Batch(4, 4, 2) and remarks == []
    assert merged["train_batch_size"] == 32
    assert merged["train_micro_batch_size_per_gpu"] * merged["gradient_accumulation_steps"] * 2 == 32
    assert merged["optimizer"]["params"]["lr"] == 1e-3
    assert merged["scheduler"]["params"] == {
        "total_num_steps": 100,
        "warmup_num_steps": 25,
        "warmup_type": "linear",
    }


@pytest.mark.parametrize(
    ("kind", "params", "flags", "expected"),
    [
        # The JSON's own share of the run is kept, 10 % where it has none.
        ("WarmupCosineLR", {"total_num_steps": 640, "warmup_num_steps": 64}, {}, 20),
        ("WarmupDecayLR", {"total_num_steps": 100, "warmup_num_steps": 50}, {}, 100),
        ("WarmupCosineLR", {}, {}, 20),
        ("WarmupDecayLR", {"warmup_num_steps": "auto", "total_num_steps": "auto"}, {}, 20),
        ("WarmupLR", {"warmup_num_steps": 30}, {}, 30),
        ("WarmupLR", {"warmup_num_steps": 30}, {"warmup": 0.5}, 100),
        ("WarmupCosineLR", {"warmup_num_steps": 30}, {"warmup": 15}, 15),
        ("WarmupCosineLR", {"warmup_num_steps": 30}, {"warmup": 0}, 1),
    ],
)
def test_warmup(kind: str, params: dict[str, Any], flags: dict[str, Any], expected: int) -> None:
    config = {**JSON, "scheduler": {"type": kind, "params": params}}
    merged, _, _ = merge_flags(config, RunSettings(steps=200, lr=0.5, **flags), world_size=1)
    result = merged["scheduler"]["params"]
    assert result["warmup_num_steps"] == expected
    assert result.get("total_num_steps") == (None if kind == "WarmupLR" else 200)
    # These two would otherwise run at a peak of their own.
    assert result.get("warmup_max_lr") == (None if kind == "WarmupCosineLR" else 0.5)


def test_a_run_shorter_than_its_warmup_is_said_aloud() -> None:
    _, _, remarks = merge_flags(JSON, RunSettings(steps=20, warmup=50), world_size=1)
    assert remarks == ["the warm-up takes 50 steps and the run 20: the learning rate never gets past the warm-up."]
    [remark] = merge_flags(JSON, RunSettings(steps=1), world_size=1)[2]
    assert remark.startswith("the warm-up takes 1 step and the run 1: ")


def test_auto_values_are_dropped() -> None:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AMCS", "params": {"lr": "auto", "weight_decay": "auto", "eps": 1e-8}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    merged, _, _ = merge_flags(config, RunSettings(micro_batch=2), world_size=1)
    assert merged["optimizer"]["params"] == {"eps": 1e-8}
    assert merged["zero_optimization"] == {"stage": 2}
    assert merged["train_micro_batch_size_per_gpu"] == 2


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"optimizer": None}, {}, "no 'optimizer' section"),
        ({"scheduler": None}, {"warmup": 0.1}, "--warmup needs a 'scheduler'"),
        ({"scheduler": {"type": "OneCycle"}}, {"warmup": 0.1}, "does not apply to scheduler 'OneCycle'"),
        (
            {"sequence_parallel_size": 2},
            {},
            r"sequence_parallel_size is 2 \(Ulysses\), for which ranks must be given the",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, {}, "autotp_size is 2, .* train in a loop of your own"),
    ],
)
def test_flags_with_nowhere_to_go(change: dict[str, Any], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge_flags({**JSON, **change}, RunSettings(**flags), world_size=1)
