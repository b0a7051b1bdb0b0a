"""Weights without master copies, states below 8 bits and released gradients, on real ranks at every ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from ranks import case, run_ranks

STAGES = (1, 2, 3)
WORLD_SIZES = (1, 2)
Results = dict[str, list[dict[str, Any]]]


def places(*stages: int) -> Any:
    """For a test with the fixture `here`; one process does at the other stages much what it does at the second."""
    slow = pytest.mark.slow
    found = [(n, stage) for n in WORLD_SIZES for stage in stages]
    marked = [pytest.param(*place, marks=slow) if place in ((1, 1), (1, 3)) else place for place in found]
    return pytest.mark.parametrize(("world_size", "stage"), marked)


def config(world_size: int, stage: int, params: dict[str, Any], *, accumulation: int = 1, **top: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 20_000} | top.pop("zero", {})
    return {
        "train_micro_batch_size_per_gpu": 4 // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AMCS", "params": {"lr": 3e-3} | params},
        "zero_optimization": zero,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
    } | top


COMPILED = {"state_format": "compact", "weights": "bf16+4"}
LEAN = COMPILED | {"compile": False}  # of a model this small a step takes no time, compiling it does


def same_of(world_size: int, stage: int, params: dict[str, Any], **top: Any) -> dict[str, Any]:
    """Every rank sees the same sequences."""
    return config(world_size, stage, params, gradient_clipping=0.0, **top) | {"train_micro_batch_size_per_gpu": 4}


def usual(world_size: int) -> dict[str, dict[str, Any]]:
    """What several tests compare with."""
    made = {}
    for stage in STAGES:
        made[f"same-{stage}"] = case(same_of(world_size, stage, COMPILED), same_data=True, dump=True, full=True)
        if world_size > 2:
            continue
        bare = {"weights": "bf16", "compile": False}
        made[f"bare-{stage}"] = case(same_of(world_size, stage, bare), same_data=True, dump=True, full=True)
        other: dict[str, Any] = {"zero": {"offload_optimizer": {"device": "cpu"}}} if stage == 3 else {}
        again = same_of(world_size, stage, bare | {"release_gradients": stage < 3}, **other)
        made[f"bare-again-{stage}"] = case(again, same_data=True, save_at=2)
    return made


def cases(world_size: int, stages: Iterable[int]) -> dict[str, dict[str, Any]]:
    made = {}
    for stage in stages:
        for weights in ("fp32", "bf16+16"):
            made[f"{weights}-{stage}"] = case(
                config(world_size, stage, {"weights": weights, "compile": False}), steps=1, full=True
            )
        made[f"lean-{stage}"] = case(config(world_size, stage, LEAN), full=True)
        made[f"poison-{stage}"] = case(config(world_size, stage, LEAN), steps=5, poison_at=2)
        made[f"unused-{stage}"] = case(config(world_size, stage, LEAN), unused=True, full=True)
        made[f"overlap-{stage}"] = case(config(world_size, stage, LEAN, zero={"overlap_comm": True}))
        made[f"accumulated-{stage}"] = case(config(world_size, stage, LEAN, accumulation=2))
        if stage > 1:
            wide = {"data_types": {"grad_accum_dtype": "fp32"}}
            made[f"accumulated-fp32-{stage}"] = case(config(world_size, stage, LEAN, accumulation=2, **wide))
            offload = {"offload_optimizer": {"device": "cpu"}}
            made[f"offload-{stage}"] = case(config(world_size, stage, LEAN, zero=offload), full=True)
            single = LEAN | {"mode": "single", "state_format": "minimal"}
            made[f"single-{stage}"] = case(config(world_size, stage, single), steps=8)
            mixed = {"mode": "mixed", "state_format": "leanest", "weights": "bf16", "compile": False}
            for name, save_at in (("mixed", None), ("mixed-saved", 4)):
                made[f"{name}-{stage}"] = case(config(world_size, stage, mixed), steps=8, save_at=save_at)
        released = LEAN | {"release_gradients": True}
        made[f"released-{stage}"] = case(config(world_size, stage, released), steps=8)
        made[f"released-saved-{stage}"] = case(config(world_size, stage, released), steps=8, save_at=4)
        made[f"released-poison-{stage}"] = case(config(world_size, stage, released), steps=5, poison_at=2)
        for name, params in (("held", LEAN), ("released", released)):
            free = config(world_size, stage, params, gradient_clipping=0.0)
            made[f"unclipped-{name}-{stage}"] = case(free, full=True, dump=True)
            if stage == 3:
                gathered = {"stage3_param_persistence_threshold": 0}
                free = config(world_size, stage, params, gradient_clipping=0.0, zero=gathered)
                made[f"gathered-{name}"] = case(free, full=True, loss="chunked", activations="checkpoint")
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    """By world size; of one process what is the same at every stage, at the second."""
    folder = tmp_path_factory.mktemp("formats")
    stages = {1: (2,), 2: STAGES, 4: ()}
    return {n: run_ranks(folder / str(n), n, usual(n) | cases(n, stages[n])) for n in stages}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of one process at the other stages."""
    return run_ranks(tmp_path_factory.mktemp("alone"), 1, cases(1, (1, 3)))


@pytest.fixture
def here(request: pytest.FixtureRequest, runs: dict[int, Results], world_size: int, stage: int) -> Results:
    """What the cases of a place are found in."""
    return request.getfixturevalue("alone") if (world_size, stage) in ((1, 1), (1, 3)) else runs[world_size]


@pytest.mark.parametrize("stage", STAGES)
def test_packed_codes_and_rounding_agree_at_every_world_size(runs: dict[int, Results], stage: int) -> None:
    """With equal gradients codes, remainders and weights are equal to the last bit."""

    def whole(world_size: int) -> dict[str, torch.Tensor]:
        ranks = runs[world_size][f"same-{stage}"]
        return {key: torch.cat([rank["held"][key] for rank in ranks]) for key in ranks[0]["held"]}

    one = whole(1)
    assert any(key.endswith("/remainder") and value.dtype == torch.uint8 for key, value in one.items())
    for world_size in (2, 4):
        other = whole(world_size)
        assert other.keys() == one.keys()
        for key, value in one.items():
            assert torch.equal(other[key][: len(value)], value), (world_size, key)
        for name, value in runs[1][f"same-{stage}"][0]["full"].items():
            assert torch.equal(runs[world_size][f"same-{stage}"][0]["full"][name], value), (world_size, name)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_alone_is_rounded_alike_at_every_world_size(runs: dict[int, Results], stage: int) -> None:
    """Matrices have no remainder; released gradients, offload and a checkpoint between two steps change nothing."""
    one, two = (runs[world_size][f"bare-{stage}"] for world_size in WORLD_SIZES)
    for key, value in one[0]["held"].items():
        assert torch.equal(torch.cat([rank["held"][key] for rank in two])[: len(value)], value), key
    for ranks in (one, two):
        full, model = ranks[0]["full"], ranks[0]["model"]
        assert all(torch.equal(full[name], model[name].float()) for name in full if full[name].dim() > 1)
        held = sum(rank["state_bytes"]["remainder"] for rank in ranks)
        assert held < 0.1 * ranks[0]["parameters"], "that of 1-D parameters, 16 bits"
    for world_size in WORLD_SIZES:
        losses = runs[world_size][f"bare-{stage}"][0]["losses"]
        assert losses[-1] < losses[0] - 0.1
        assert losses == pytest.approx(runs[1][f"same-{stage}"][0]["losses"], rel=5e-3)
        again = runs[world_size][f"bare-again-{stage}"][0]["losses"]
        assert again == (losses if stage < 3 else pytest.approx(losses, rel=1e-4))


@places(*STAGES)
def test_remainders_of_16_bits_are_fp32_master_weights(here: Results, stage: int) -> None:
    exact, kept = (here[f"{weights}-{stage}"][0]["full"] for weights in ("fp32", "bf16+16"))
    assert exact.keys() == kept.keys()
    for name, value in exact.items():
        assert torch.equal(kept[name].view(torch.int32), value.view(torch.int32)), name


@places(*STAGES)
def test_full_precision_weights_round_to_the_models(here: Results, stage: int) -> None:
    for rank, found in enumerate(here[f"lean-{stage}"]):
        if rank:
            assert found["full"] == {}
            continue
        finer = 0
        for name, weight in found["model"].items():
            whole = found["full"][name]
            assert whole.dtype == torch.float32 and whole.shape == weight.shape
            off = (whole - weight.float()).abs() > (weight.float().abs() * 2.0**-8 + 1e-40)
            assert not off.any(), name
            finer += (whole != weight.float()).sum().item()
        assert finer > 0.5 * found["parameters"], "most weights have lower bits"
    ranks = here[f"lean-{stage}"]
    for found in ranks:
        for key, part in found["parts"].items():
            name, _, cut = key.partition("[")
            start, stop = (int(number) for number in cut.rstrip("]").split(":")) if cut else (0, part.numel())
            assert torch.equal(part.flatten(), ranks[0]["full"][name].flatten()[start:stop]), key
    assert sum(part.numel() for found in ranks for part in found["parts"].values()) == sum(
        whole.numel() for whole in ranks[0]["full"].values()
    )


@places(*STAGES)
def test_nothing_of_a_lean_run_is_far_from_fp32(runs: dict[int, Results], here: Results, stage: int) -> None:
    lean = here[f"lean-{stage}"][0]
    assert lean["losses"] == pytest.approx(runs[1]["lean-2"][0]["losses"], rel=2e-3)
    assert lean["losses"][0] == here[f"fp32-{stage}"][0]["losses"][0]
    assert lean["losses"][-1] < lean["losses"][0] - 0.1


@pytest.mark.parametrize("name", ["poison", "released-poison"])
@places(*STAGES)
def test_a_step_with_nan_is_skipped_and_the_next_is_made(here: Results, name: str, stage: int) -> None:
    for rank in here[f"{name}-{stage}"]:
        assert rank["skipped"] == 1
        assert all(math.isfinite(loss) for loss in rank["losses"])
        assert rank["steps"] == [4], "the skipped step does not count"
        assert rank["losses"][4] < rank["losses"][0]


@places(*STAGES)
def test_parameters_without_gradient_only_decay(here: Results, stage: int) -> None:
    found = here[f"unused-{stage}"][0]
    assert found["losses"] == pytest.approx(here[f"lean-{stage}"][0]["losses"], rel=1e-5)
    assert "2 without a gradient so far: unused.weight, unused.bias;" in found["audit"]
    weight = found["full"]["unused.weight"]
    assert weight.isfinite().all() and 0 < weight.abs().max() < 0.2


@places(*STAGES)
def test_other_ways_to_the_same_step(here: Results, stage: int) -> None:
    """Overlapped reduction changes no bit; accumulation and the host change the order of sums at most."""
    lean = here[f"lean-{stage}"][0]
    assert here[f"overlap-{stage}"][0]["losses"] == lean["losses"]
    if stage > 1:
        assert here[f"offload-{stage}"][0]["losses"] == pytest.approx(lean["losses"], rel=1e-4)
        assert set(here[f"offload-{stage}"][0]["full"]) == set(lean["full"])
    for way in ("accumulated", "accumulated-fp32") if stage > 1 else ("accumulated",):
        assert here[f"{way}-{stage}"][0]["losses"] == pytest.approx(lean["losses"], rel=2e-3), way


@places(*STAGES)
def test_released_gradients_take_the_same_step(
    runs: dict[int, Results], here: Results, world_size: int, stage: int
) -> None:
    held, released = (here[f"unclipped-{name}-{stage}"][0] for name in ("held", "released"))
    assert released["losses"] == held["losses"]
    assert released["grad_norm"] == pytest.approx(float(held["grad_norm"]), rel=1e-5)
    for name, value in held["full"].items():
        assert torch.equal(released["full"][name], value), name
    assert held["held"].keys() == released["held"].keys()
    assert all(torch.equal(released["held"][key], value) for key, value in held["held"].items()), "padding included"
    clipped = here[f"released-{stage}"][0]["losses"]
    assert clipped[-1] < clipped[0] - 0.3
    assert clipped == pytest.approx(runs[world_size]["released-2"][0]["losses"], rel=1e-3)
    assert here[f"released-saved-{stage}"][0]["losses"] == clipped, "a checkpoint keeps the norm, too"


@places(3)
def test_no_backward_pass_sees_a_new_weight(here: Results) -> None:
    """Weights are gathered for the forward pass, once more to compute blocks again, and tied at both ends."""
    held, released = (here[f"gathered-{name}"][0] for name in ("held", "released"))
    assert released["losses"] == held["losses"] and held["losses"][-1] < held["losses"][0] - 0.1
    for name, value in held["full"].items():
        assert torch.equal(released["full"][name], value), name


@places(2, 3)
def test_one_momentum_and_4_bit_states(here: Results, stage: int) -> None:
    for rank in here[f"single-{stage}"]:
        assert set(rank["state_bytes"]) == {"m", "v", "remainder"}
        assert rank["losses"][-1] < rank["losses"][0] - 0.3


@places(2, 3)
def test_mixed_momenta_in_2_and_4_bits(runs: dict[int, Results], here: Results, world_size: int, stage: int) -> None:
    ranks = here[f"mixed-{stage}"]
    for rank in ranks:
        assert {"m", "m_far"} < set(rank["state_bytes"]) and "m_slow" not in rank["state_bytes"]
        assert rank["losses"][-1] < rank["losses"][0] - 0.3
    assert here[f"mixed-saved-{stage}"][0]["losses"] == ranks[0]["losses"]
    assert ranks[0]["losses"] == pytest.approx(runs[1]["mixed-2"][0]["losses"], rel=2e-2)
