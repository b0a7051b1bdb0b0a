"""Weights without master copies, states below 8 bits and released gradients, on real ranks at every ZeRO stage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks import case, run_ranks

STAGES = (1, 2, 3)
WORLD_SIZES = (1, 2)
Results = dict[str, list[dict[str, Any]]]


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


def cases(world_size: int) -> dict[str, dict[str, Any]]:
    made = {}
    for stage in STAGES:
        made[f"same-{stage}"] = case(same_of(world_size, stage, COMPILED), same_data=True, dump=True, full=True)
        if world_size > 2:
            continue
        for weights in ("fp32", "bf16+16"):
            made[f"{weights}-{stage}"] = case(
                config(world_size, stage, {"weights": weights, "compile": False}), steps=1, full=True
            )
        bare = {"weights": "bf16", "compile": False}
        made[f"bare-{stage}"] = case(same_of(world_size, stage, bare), same_data=True, dump=True, full=True)
        other: dict[str, Any] = {"zero": {"offload_optimizer": {"device": "cpu"}}} if stage == 3 else {}
        again = same_of(world_size, stage, bare | {"release_gradients": stage < 3}, **other)
        made[f"bare-again-{stage}"] = case(again, same_data=True, save_at=2)
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
    folder = tmp_path_factory.mktemp("formats")
    return {n: run_ranks(folder / str(n), n, cases(n)) for n in (*WORLD_SIZES, 4)}


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


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_remainders_of_16_bits_are_fp32_master_weights(runs: dict[int, Results], stage: int, world_size: int) -> None:
    exact, kept = (runs[world_size][f"{weights}-{stage}"][0]["full"] for weights in ("fp32", "bf16+16"))
    assert exact.keys() == kept.keys()
    for name, value in exact.items():
        assert torch.equal(kept[name].view(torch.int32), value.view(torch.int32)), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_full_precision_weights_round_to_the_models(runs: dict[int, Results], stage: int, world_size: int) -> None:
    for rank, found in enumerate(runs[world_size][f"lean-{stage}"]):
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
    ranks = runs[world_size][f"lean-{stage}"]
    for found in ranks:
        for key, part in found["parts"].items():
            name, _, cut = key.partition("[")
            start, stop = (int(number) for number in cut.rstrip("]").split(":")) if cut else (0, part.numel())
            assert torch.equal(part.flatten(), ranks[0]["full"][name].flatten()[start:stop]), key
    assert sum(part.numel() for found in ranks for part in found["parts"].values()) == sum(
        whole.numel() for whole in ranks[0]["full"].values()
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_nothing_of_a_lean_run_is_far_from_fp32(runs: dict[int, Results], stage: int, world_size: int) -> None:
    lean = runs[world_size][f"lean-{stage}"][0]
    assert lean["losses"] == pytest.approx(runs[1]["lean-2"][0]["losses"], rel=2e-3)
    assert lean["losses"][0] == runs[world_size][f"fp32-{stage}"][0]["losses"][0]
    assert lean["losses"][-1] < lean["losses"][0] - 0.1


@pytest.mark.parametrize("name", ["poison", "released-poison"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_step_with_nan_is_skipped_and_the_next_is_made(runs: dict[int, Results], name: str, world_size: int) -> None:
    for stage in STAGES:
        for rank in runs[world_size][f"{name}-{stage}"]:
            assert rank["skipped"] == 1
            assert all(math.isfinite(loss) for loss in rank["losses"])
            assert rank["steps"] == [4], "the skipped step does not count"
            assert rank["losses"][4] < rank["losses"][0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_parameters_without_gradient_only_decay(runs: dict[int, Results], stage: int, world_size: int) -> None:
    found = runs[world_size][f"unused-{stage}"][0]
    assert found["losses"] == pytest.approx(runs[world_size][f"lean-{stage}"][0]["losses"], rel=1e-5)
    assert "2 without a gradient so far: unused.weight, unused.bias;" in found["audit"]
    weight = found["full"]["unused.weight"]
    assert weight.isfinite().all() and 0 < weight.abs().max() < 0.2


@pytest.mark.parametrize("stage", STAGES)
def test_other_ways_to_the_same_step(runs: dict[int, Results], stage: int) -> None:
    """Overlapped reduction changes no bit; accumulation and the host change the order of sums at most."""
    for world_size in WORLD_SIZES:
        found = runs[world_size]
        assert found[f"overlap-{stage}"][0]["losses"] == found[f"lean-{stage}"][0]["losses"]
        if stage > 1:
            assert found[f"offload-{stage}"][0]["losses"] == pytest.approx(
                found[f"lean-{stage}"][0]["losses"], rel=1e-4
            )
            assert set(found[f"offload-{stage}"][0]["full"]) == set(found[f"lean-{stage}"][0]["full"])
        for way in ("accumulated", "accumulated-fp32") if stage > 1 else ("accumulated",):
            accumulated = found[f"{way}-{stage}"][0]["losses"]
            assert accumulated == pytest.approx(found[f"lean-{stage}"][0]["losses"], rel=2e-3), way


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_released_gradients_take_the_same_step(runs: dict[int, Results], stage: int, world_size: int) -> None:
    held, released = (runs[world_size][f"unclipped-{name}-{stage}"][0] for name in ("held", "released"))
    assert released["losses"] == held["losses"]
    assert released["grad_norm"] == pytest.approx(float(held["grad_norm"]), rel=1e-5)
    for name, value in held["full"].items():
        assert torch.equal(released["full"][name], value), name
    assert held["held"].keys() == released["held"].keys()
    assert all(torch.equal(released["held"][key], value) for key, value in held["held"].items()), "padding included"
    clipped = runs[world_size][f"released-{stage}"][0]["losses"]
    assert clipped[-1] < clipped[0] - 0.3
    assert clipped == pytest.approx(runs[world_size]["released-2"][0]["losses"], rel=1e-3)
    assert runs[world_size][f"released-saved-{stage}"][0]["losses"] == clipped, "a checkpoint keeps the norm, too"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_no_backward_pass_sees_a_new_weight(runs: dict[int, Results], world_size: int) -> None:
    """Weights are gathered for the forward pass, once more to compute blocks again, and tied at both ends."""
    held, released = (runs[world_size][f"gathered-{name}"][0] for name in ("held", "released"))
    assert released["losses"] == held["losses"] and held["losses"][-1] < held["losses"][0] - 0.1
    for name, value in held["full"].items():
        assert torch.equal(released["full"][name], value), name


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_momentum_and_4_bit_states(runs: dict[int, Results], stage: int, world_size: int) -> None:
    for rank in runs[world_size][f"single-{stage}"]:
        assert set(rank["state_bytes"]) == {"m", "v", "remainder"}
        assert rank["losses"][-1] < rank["losses"][0] - 0.3
