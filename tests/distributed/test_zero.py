"""Real ranks over gloo: 1, 2 and 4 of them, stages 0 to 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import case, run_ranks

STAGES = (1, 2, 3)
KEPT = {1: "tiled", 2: "checkpoint,tiled", 3: "offload,tiled"}
"""Activations by stage; elsewhere blocks are checkpointed."""
# Other ways to lay weights out and to send them.
LAYOUTS = {
    "aligned-1": (1, "parameter_alignment"),
    "aligned-2": (2, "parameter_alignment"),
    "fetched": (3, "stage3_use_all_reduce_for_fetch_params"),
    "sequential": (3, "stage3_allgather_sequential"),
}
Results = dict[str, list[dict[str, Any]]]


def optimizer(rule: str, **params: Any) -> dict[str, Any]:
    return {"type": rule, "params": {"lr": 3e-3, "compile": False, **params}}


def config(
    rule: str, stage: int, world_size: int, precision: str | None = "bf16", *, compile: bool = False, **top: Any
) -> dict[str, Any]:
    """Eager unless asked: of a model this small a step takes no time, compiling it does."""
    accumulation = top.get("gradient_accumulation_steps", 1)
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4 // world_size // accumulation,
        "optimizer": optimizer(rule, compile=compile),
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000},
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
    }
    if precision:
        made[precision] = {"enabled": True}
    return made | top


def cases(world_size: int) -> dict[str, dict[str, Any]]:
    def conf(*args: Any, **top: Any) -> dict[str, Any]:
        return config(args[0], args[1], world_size, *args[2:], **top)

    made = {f"split-{stage}": case(conf("SOAM", stage), dump=True) for stage in STAGES}
    for stage in STAGES:
        # Every rank has the whole batch, and nothing is clipped: a norm is summed in another order at each
        # world size. So the averaged gradients are equal to the last bit.
        same = conf("AMCS", stage, compile=True, gradient_clipping=0.0) | {"train_micro_batch_size_per_gpu": 4}
        made[f"same-{stage}"] = case(same, same_data=True, dump=True, steps=6, layers=2)
    if world_size == 4:
        return made
    made["fp16-0"] = case(conf("AMCS", 0, "fp16", fp16={"enabled": True, "initial_scale_power": 6}), steps=6)
    made["bf16-0"] = case(conf("AMCS", 0))
    made["fp32-0"] = case(conf("AMCS", 0, None))
    made["fp32-2"] = case(conf("AMCS", 2, None))
    made["fp16-1"] = case(conf("AMCS", 1, "fp16", fp16={"enabled": True, "initial_scale_power": 6}), steps=6)
    made["fp16-3"] = case(conf("AMCS", 3, "fp16", fp16={"enabled": True, "initial_scale_power": 6}), steps=6)
    made["overflow"] = case(conf("AMCS", 2, "fp16", fp16={"enabled": True, "initial_scale_power": 30}), steps=6)
    for stage in (2, 3):
        zero = {"stage": stage, "reduce_bucket_size": 20_000, "offload_optimizer": {"device": "cpu"}}
        made[f"offload-{stage}"] = case(conf("SOAM", stage, zero_optimization=zero))
        zero = zero | {"offload_optimizer": {"device": "cpu"}}
        if world_size == 1:
            accumulated = conf("SOAM", stage, zero_optimization=zero, gradient_accumulation_steps=2)
            made[f"offload-accumulation-{stage}"] = case(accumulated)
        made[f"Lion-{stage}"] = case(conf("Lion", stage), steps=8)
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2, "warmup_type": "linear"}}
    made["scheduler"] = case(conf("AMCS", 2, scheduler=warmup))
    for stage in STAGES:
        if world_size == 1:
            made[f"accumulation-{stage}"] = case(conf("SOAM", stage, gradient_accumulation_steps=2))
        made[f"saved-{stage}"] = case(conf("SOAM", stage), save_at=2)
        if world_size == 2:
            for products in ("native", "fp32"):
                made[f"{products}-products-{stage}"] = case(
                    conf("AMCS", stage), products=products, recompute=stage == 2, layers=2
                )
            made[f"chunked-{stage}"] = case(conf("AMCS", stage, None), loss="chunked")
            made[f"kept-{stage}"] = case(conf("AMCS", stage, None), loss="chunked", activations=KEPT[stage])
    if world_size == 2:
        zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
        for products in ("native", "fp32"):
            made[f"{products}-products-offload"] = case(conf("AMCS", 2, zero_optimization=zero), products=products)
        made["plain"] = case(conf("AMCS", 2, None), loss="plain")
        released = conf("AMCS", 2, optimizer=optimizer("AMCS", release_gradients=True))
        for kept in ("full", "tiled"):
            made[f"{kept}-released"] = case(released, loss="chunked", activations=kept)
        for stage in STAGES:  # a power of two: the mean is the same to the last bit
            made[f"predivided-{stage}"] = case(conf("SOAM", stage, gradient_predivide_factor=4.0))
        made["prescaled"] = case(conf("SOAM", 3, prescale_gradients=True))
        for name, (stage, key) in LAYOUTS.items():
            zero = {"stage": stage, "reduce_bucket_size": 20_000, key: True}
            made[name] = case(conf("SOAM", stage, zero_optimization=zero))
    return made


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    """By world size, what every case's ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    plugin = Path(__file__).parents[1] / "plugins" / "lion.py"
    return {n: run_ranks(folder / str(n), n, cases(n), plugins=[plugin]) for n in (1, 2, 4)}


def whole(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Shards joined over ranks; the padding at the end differs by world size."""
    return {key: torch.cat([rank["held"][key] for rank in ranks]) for key in ranks[0]["held"]}


@pytest.mark.parametrize("stage", STAGES)
def test_equal_gradients_give_equal_codes_at_every_world_size(runs: dict[int, Results], stage: int) -> None:
    one = whole(runs[1][f"same-{stage}"])
    assert any(key.endswith("m_fast.scale") for key in one)
    for world_size in (2, 4):
        other = whole(runs[world_size][f"same-{stage}"])
        assert other.keys() == one.keys()
        for key, value in one.items():
            assert torch.equal(other[key][: len(value)], value), (world_size, key)
        assert runs[world_size][f"same-{stage}"][0]["losses"] == runs[1][f"same-{stage}"][0]["losses"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_split_batch_differs_by_reduction_order_only(runs: dict[int, Results], stage: int, world_size: int) -> None:
    one, many = runs[1][f"split-{stage}"], runs[world_size][f"split-{stage}"]
    assert many[0]["losses"] == pytest.approx(one[0]["losses"], rel=2e-3)
    for key, value in whole(one).items():
        if key.endswith("/m"):
            # A bf16 gradient summed in another order moves a code by a few steps at most.
            apart = (whole(many)[key][: len(value)].float() - value.float()).abs().mean()
            assert apart < (4.0 if value.dtype == torch.int8 else 1e-2), key


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stages_agree(runs: dict[int, Results], world_size: int) -> None:
    first = runs[world_size]["split-1"][0]["losses"]
    assert first[-1] != first[0]
    for stage in (2, 3):
        assert runs[world_size][f"split-{stage}"][0]["losses"] == pytest.approx(first, rel=2e-3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_parameters_move_on_some_rank(runs: dict[int, Results], world_size: int) -> None:
    for name, ranks in runs[world_size].items():
        if name.startswith(("split", "same", "offload", "accumulation", "saved")):
            assert {"each in one group, moved by step" in rank["audit"] for rank in ranks} == {True}, name


@pytest.mark.parametrize("stage", STAGES)
def test_chunked_loss_trains_a_tied_head(runs: dict[int, Results], stage: int) -> None:
    losses = runs[2]["plain"][0]["losses"]
    assert losses[-1] != losses[0]
    assert runs[2][f"chunked-{stage}"][0]["losses"] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_do_not_depend_on_the_activations_that_are_kept(runs: dict[int, Results], stage: int) -> None:
    losses, found = (runs[2][f"{name}-{stage}"][0]["losses"] for name in ("chunked", "kept"))
    # What the optimizer's codes make of a last bit grows with each step.
    assert found == pytest.approx(losses, rel=1e-5)


def test_tiles_hand_over_each_gradient_once(runs: dict[int, Results]) -> None:
    """A second part of one would be refused, and the update of a part alone another."""
    full, tiled = (runs[2][f"{kept}-released"][0]["losses"] for kept in ("full", "tiled"))
    assert tiled == pytest.approx(full, rel=2e-3) and full[-1] < full[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rule", ["AMCS", "SOAM"])
def test_each_rank_holds_its_share(runs: dict[int, Results], stage: int, rule: str) -> None:
    name = f"{'same' if rule == 'AMCS' else 'split'}-{stage}"
    alone = sum(runs[1][name][0]["state_bytes"].values())
    for rank in runs[2][name]:
        held = sum(rank["state_bytes"].values())
        # Padding to whole blocks on each rank costs up to one block per group (stage 3: per parameter).
        assert held == pytest.approx(alone / 2, rel=0.05 if stage < 3 else 0.25)


def test_how_a_mean_is_scaled_on_the_way_changes_nothing(runs: dict[int, Results]) -> None:
    for stage in STAGES:
        plain = runs[2][f"split-{stage}"][0]["losses"]
        assert runs[2][f"predivided-{stage}"][0]["losses"] == plain
    assert runs[2]["prescaled"][0]["losses"] == runs[2]["split-3"][0]["losses"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_train_alike(runs: dict[int, Results], name: str) -> None:
    stage, _ = LAYOUTS[name]
    # Padding between parameters moves the grid of blocks; a way of sending changes nothing.
    allowed = 2e-3 if stage < 3 else 0.0
    assert runs[2][name][0]["losses"] == pytest.approx(runs[2][f"split-{stage}"][0]["losses"], rel=allowed, abs=0.0)


def test_stage_0_start_up_step_does_not_count(runs: dict[int, Results]) -> None:
    for world_size in (1, 2):
        for name in ("bf16-0", "fp32-0"):
            assert runs[world_size][name][0]["steps"] == [4]


def test_precisions_train_alike(runs: dict[int, Results]) -> None:
    for world_size in (1, 2):
        result = runs[world_size]
        exact = result["fp32-2"][0]["losses"]
        assert result["fp32-0"][0]["losses"] == pytest.approx(exact, rel=1e-4)
        for name in ("fp16-0", "fp16-1", "fp16-3", "bf16-0"):
            assert result[name][0]["skipped"] == 0
            assert result[name][0]["losses"][:4] == pytest.approx(exact, rel=2e-3), name


def test_fp16_overflow_skips_the_step_and_its_count(runs: dict[int, Results]) -> None:
    for world_size in (1, 2):
        rank = runs[world_size]["overflow"][0]
        assert rank["skipped"] > 0
        assert rank["steps"] in ([6 - rank["skipped"]], [])


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_gives_the_same_losses(runs: dict[int, Results], stage: int) -> None:
    for world_size in (1, 2):
        on_host = runs[world_size][f"offload-{stage}"][0]["losses"]
        assert on_host == pytest.approx(runs[world_size][f"split-{stage}"][0]["losses"], rel=2e-3)


@pytest.mark.parametrize("way", ["accumulation-1", "accumulation-2", "accumulation-3"])
def test_gradient_accumulation_equals_the_large_batch(runs: dict[int, Results], way: str) -> None:
    assert runs[1][way][0]["losses"] == pytest.approx(runs[1]["split-2"][0]["losses"], rel=2e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_accumulation_with_offload(runs: dict[int, Results], stage: int) -> None:
    losses = runs[1][f"offload-accumulation-{stage}"][0]["losses"]
    assert losses == pytest.approx(runs[1][f"split-{stage}"][0]["losses"], rel=2e-3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_deepspeeds_own_checkpoint_resumes_bit_for_bit(runs: dict[int, Results], world_size: int, stage: int) -> None:
    saved, plain = runs[world_size][f"saved-{stage}"][0], runs[world_size][f"split-{stage}"][0]
    assert saved["losses"] == plain["losses"]


def test_scheduler_keeps_component_scales(runs: dict[int, Results]) -> None:
    rank = runs[2]["scheduler"][0]
    scale = {"attention": 1.2, "embedding": 0.8, "head": 0.8}
    expected = [1e-3 * scale.get(group["component"], 1.0) for group in rank["groups"]]
    assert rank["rates"][-1] == pytest.approx(expected)


def test_a_users_rule_gets_8_bit_state_and_zero(runs: dict[int, Results]) -> None:
    for stage in (2, 3):
        for world_size in (1, 2):
            rank = runs[world_size][f"Lion-{stage}"][0]
            assert set(rank["state_bytes"]) == {"m", "remainder"}
            assert rank["losses"][-1] < rank["losses"][0]
        assert {g["state_format"]["m"] for g in rank["groups"] if g["component"] == "ffn"} == {"8bit"}


@pytest.mark.parametrize("kind", ["1", "2", "3", "offload"])
def test_products_in_fp32_give_the_losses_of_products_in_bf16(runs: dict[int, Results], kind: str) -> None:
    """Both on every machine; not the same bits, since fp32 sums are not those of bf16 instructions."""
    native, fp32 = (runs[2][f"{products}-products-{kind}"][0]["losses"] for products in ("native", "fp32"))
    assert fp32 == pytest.approx(native, rel=2e-3)
    assert fp32[-1] < fp32[0]
