"""Ranks that run different modules, or the same ones in another order, train as one process with all batches does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import launch

from toolkit.errors import UserError
from toolkit.zero.agreement import Order

Results = dict[str, list[dict[str, Any]]]


def case(
    optimizer: str = "AMCS",
    stage: int = 2,
    *,
    route: str = "rank",
    turned: bool = False,
    params: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
    **top: Any,
) -> dict[str, Any]:
    """`route`: how experts are chosen. `turned`: rank 1 runs the towers in the other order."""
    own = {"state_format": "fp32", "weights": "fp32", "compile": False} if optimizer == "AMCS" else {"torch_adam": True}
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2, "weight_decay": 0.0} | own | (params or {})},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_500} | (zero or {}),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
    }
    return {"config": made | top, "route": route, "turned": turned}


BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES: dict[str, dict[str, Any]] = {
    f"{optimizer}-{stage}-{route}": case(optimizer, stage, route=route, turned=route == "step")
    for optimizer, stages in (("AMCS", (0, 1, 2)), ("AdamW", (2,)))
    for stage in stages
    for route in ("rank", "step")
}
CASES |= {
    f"{optimizer}-{stage}-accumulation": case(optimizer, stage, route="step", gradient_accumulation_steps=2)
    for optimizer, stage in (("AMCS", 1), ("AMCS", 2), ("AdamW", 2))
}
MORE: dict[str, dict[str, Any]] = {
    f"AdamW-{stage}-{route}": case("AdamW", stage, route=route, turned=route == "step")
    for stage in (0, 1)
    for route in ("rank", "step")
} | {
    "AdamW-1-accumulation": case("AdamW", 1, route="step", gradient_accumulation_steps=2),
    "AdamW-overlap-1": case("AdamW", 1, route="step", zero={"overlap_comm": True}),
}
"""Of `make test-slow`: where AdamW's gradients go as they do at stage 2."""
CASES |= {
    "large-bucket": case(route="step", zero={"reduce_bucket_size": 5_000_000}),
    "overlap": case(route="step", zero={"overlap_comm": True}),
    "AdamW-overlap-2": case("AdamW", 2, route="step", zero={"overlap_comm": True, "contiguous_gradients": False}),
    "offload": case(route="step", zero=OFFLOAD),
    "released": case(route="step", params={"release_gradients": True}),
    "bf16": case(route="step", params={"weights": "bf16+16"}, **BF16),
    "bf16-accumulation": case(
        stage=1, route="step", gradient_accumulation_steps=2, params={"weights": "bf16+16"}, **BF16
    ),
    "8bit": case(route="step", params={"state_format": "8bit"}) | {"reference": {"state_format": "8bit"}},
}
# In a step's second micro-batch the expert of the step before, and two forward passes before two backward passes.
CASES |= {"3-accumulation": case(stage=3, route="back", gradient_accumulation_steps=2)}
CASES |= {f"{stage}-twice": case(stage=stage, route="same") | {"twice": True} for stage in (2, 3)}
# Where a config says nothing, DeepSpeed clips at 1.0, which the reference does not.
CASES |= {f"mixture-{stage}": case(stage=stage, gradient_clipping=0.0) | {"mixture": True} for stage in (1, 2, 3)}
SPLIT = {"stage3_param_persistence_threshold": 0}  # small weights are cut like large ones
CHECKS: dict[str, dict[str, Any]] = {
    f"{check}-{stage}": case(stage=stage) | {"check": check}
    for check, stages in {"changes": (0, 1, 3), "refused": (0, 3), "empty": (0, 2, 3), "compiled": (2, 3)}.items()
    for stage in stages
}
LEAVES: dict[str, dict[str, Any]] = {
    "leaf": case(stage=3, route="step", turned=True, zero=SPLIT) | {"leaf": True},
    "AdamW-leaf": case("AdamW", 3, route="step", turned=True, zero=SPLIT) | {"leaf": True},
}
# Last, since no rank ends its pass.
STOPPED: dict[str, dict[str, Any]] = {
    "kept": case(stage=3, route="even"),
    "turned": case(stage=3, route="same", turned=True),
    "AdamW-gathered": case("AdamW", 3, route="rank", zero=SPLIT),
}


def ran(folder: Path, cases: dict[str, dict[str, Any]]) -> Results:
    ranks = launch(folder, 2, Path(__file__).with_name("experts_worker.py"), {"cases": cases})
    return {name: [rank[name] for rank in ranks] for name in cases}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return ran(tmp_path_factory.mktemp("experts"), CASES | LEAVES | CHECKS | STOPPED)


@pytest.mark.parametrize("name", [*CASES, *LEAVES])
def test_ranks_with_different_gradients_train_as_one_process(runs: Results, name: str) -> None:
    for rank in runs[name]:
        assert rank.get("off", 1.0) < (0.15 if "bf16" in name or "8bit" in name else 1e-3), rank


@pytest.mark.slow
def test_so_do_those_of_deepspeeds_adamw(tmp_path: Path) -> None:
    for name, ranks in ran(tmp_path, MORE).items():
        assert all(rank.get("off", 1.0) < 1e-3 for rank in ranks), (name, ranks)


@pytest.mark.parametrize("name", STOPPED)
def test_stage_3_stops_before_weights_mix(runs: Results, name: str) -> None:
    for rank in runs[name]:
        assert "at ZeRO stage 3 all must run the same modules in the same order" in rank["error"]
        assert "leaf_module.classes" in rank["error"] and "\n" not in rank["error"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_changes_after_the_engine_was_made_is_named(runs: Results, stage: int) -> None:
    found, other = runs[f"changes-{stage}"]
    assert found["thawed"] == [
        "frozen.weight, frozen.bias: unfrozen after the engine was made and will not be trained: set requires_grad "
        "before"
    ]
    expert = "routed.experts.0.up.weight, routed.experts.0.up.bias, routed.experts.0.down.weight"
    assert f"{expert}: frozen" in found["frozen"][0]
    if stage != 3:
        assert "more.weight, more.bias: added or replaced" in found["added"][0]
        assert "routed.experts.3.up.weight" in found["replaced"][0]
        # At stage 0 in fp32 the optimizer steps the model's own weights; at stage 3 none are there to write to.
        assert any("inp.weight" in text and "written to" in text for text in found["written"]) == (stage == 1)
    # Through `data`, of which torch counts no versions, and at stage 3 gathered.
    assert [text.split(":")[0] for text in found["scaled"]] == ([] if stage == 0 else ["inp.weight"])
    assert not found["nothing"]
    assert not any(other.values()), "one rank says it"


@pytest.mark.parametrize("stage", [0, 3])
def test_what_cannot_be_trained_is_refused(runs: Results, stage: int) -> None:
    for found in runs[f"refused-{stage}"]:
        says = {"fp64": "'1.weight': trainable weights are float64", "complex": "'0.weight'", "sparse": "'0' makes"}
        assert len(found) == len(says) * (2 if stage else 1)
        for name, text in found.items():
            assert says[name.split("-")[0]] in text and "\n" not in text, name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_parameter_without_elements(runs: Results, stage: int) -> None:
    assert all(rank["moved"] for rank in runs[f"empty-{stage}"])


@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_modules_keep_their_names_and_stay_compiled(runs: Results, stage: int) -> None:
    for found in runs[f"compiled-{stage}"]:
        for how in ("whole", "parts"):
            assert found[how]["names"] == found["plain"]["names"]
            assert found[how]["losses"] == pytest.approx(found["plain"]["losses"], rel=1e-4)
            assert found[how]["graphs"] > 0
        assert found["plain"]["graphs"] == 0


def test_only_one_order_on_all_ranks_is_let_through() -> None:
    ranks = [Order() for _ in range(3)]
    for numbers in ([[3, 1, 2]] * 3, [[]] * 3, [[3, 1, 2], [3, 2, 1], [3, 1, 2]], [[1], [1, 0], [1]]):
        for order, noted in zip(ranks, numbers, strict=True):
            for number in noted:
                order.note(number)
        total = sum(order.tensor("cpu").item() for order in ranks)
        same = all(noted == numbers[0] for noted in numbers)
        for order in ranks:
            if same:
                order.check(total, 3)
            else:
                with pytest.raises(UserError, match="in another order"):
                    order.check(total, 3)
