"""Released gradients: with a rule that keeps no state, LOMO, with a second moment kept by rows and columns, and with
rules that look at whole parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plugins_worker import Model, gradients
from ranks import launch
from references import FACTORED, follow
from release_worker import Model as Halves

STAGES = (1, 2, 3)
WHOLE = {
    "StableAdamW": (3,),
    "Lamb8": (2,),
    "Adafactor8": (2, 3),
    "Muon8": (1, 3),
    "NorMuon": (2,),
    "AdaMuon": (3,),
    "SinkGD": (2,),
    "SCALE": (3,),
}
"""Rules that look at whole parameters, and the stages that they are tried at."""

STEPS, RATE, DECAY = 4, 5.0, 0.1
"""With a smaller rate LOMO's steps would be so small that fp32 weights round them."""


def config(stage: int, released: bool, **top: Any) -> dict[str, Any]:
    params = {"lr": RATE, "weight_decay": DECAY, "release_gradients": released, "compile": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "LOMO", "params": params},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000},
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000,
    } | top


def factored(stage: int, released: bool, m: str, **top: Any) -> dict[str, Any]:
    params = {"lr": 1e-2, "weight_decay": DECAY, "state_format": {"m": m, "v": "factored"}}
    params |= {"release_gradients": released, "compile": False}
    return config(stage, released) | {"optimizer": {"type": "AdamW8", "params": params}} | top


def offloaded(made: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The same with the step on the host."""
    zero = made["zero_optimization"] | {"offload_optimizer": {"device": "cpu"}} | more
    return made | {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}


def cases() -> dict[str, dict[str, Any]]:
    made = {}
    for rule, stages in WHOLE.items():
        params = {"lr": 1e-2, "weight_decay": DECAY, "compile": False}
        for stage in stages:
            for released in (False, True):
                kind = {"type": rule, "params": params | {"release_gradients": released}}
                top = {"bf16": {"enabled": True}, "optimizer": kind}
                made[f"{rule}-bf16-{stage}-{released}"] = config(stage, released, **top)
            made[f"{rule}-bf16-{stage}-offloaded"] = offloaded(made[f"{rule}-bf16-{stage}-True"])
    for stage in STAGES:
        made[f"factored-fp32-{stage}"] = factored(stage, True, "fp32")
        for released in (False, True):
            made[f"factored-bf16-{stage}-{released}"] = factored(stage, released, "8bit", bf16={"enabled": True})
        made[f"factored-bf16-{stage}-offloaded"] = offloaded(made[f"factored-bf16-{stage}-True"])
        made[f"fp32-{stage}"] = config(stage, True)
        for released in (False, True):
            made[f"bf16-{stage}-{released}"] = config(stage, released, bf16={"enabled": True})
        made[f"bf16-{stage}-offloaded"] = offloaded(made[f"bf16-{stage}-True"])
    weights = {"offload_param": {"device": "cpu"}}
    made["factored-bf16-3-weights, too"] = offloaded(made["factored-bf16-3-True"], **weights)
    files = {"offload_optimizer": {"device": "nvme", "nvme_path": "."}}
    for stage in STAGES:
        made[f"factored-bf16-{stage}-in files"] = offloaded(made[f"factored-bf16-{stage}-True"], **files)
    return {name: {"config": one, "steps": STEPS, "same": False, "warm": False} for name, one in made.items()}


@pytest.fixture(scope="module", params=[2, pytest.param(1, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank wrote."""
    worker = Path(__file__).with_name("plugins_worker.py")
    folder = tmp_path_factory.mktemp("release")
    return launch(folder, request.param, worker, {"plugins": [], "cases": cases()})


@pytest.mark.parametrize("stage", STAGES)
def test_lomo_with_released_gradients_follows_its_equation(ranks: Any, stage: int) -> None:
    got = ranks[0][f"fp32-{stage}"]
    assert not any(got["bytes"].values()), "no state"
    seen = [[gradients(step, rank) for rank in range(len(ranks))] for step in range(STEPS)]
    square = 0.0
    for name, p in Model().named_parameters():
        mean = [np.mean([by_rank[name].double().numpy() for by_rank in step], axis=0) for step in seen]
        square += float((mean[-1] ** 2).sum())
        start = p.detach().double().numpy()
        want = follow("LOMO", RATE, DECAY if p.dim() > 1 else 0.0, start, mean)
        error = np.linalg.norm(got["weights"][name].double().numpy() - want)
        assert error < 1e-5 * np.linalg.norm(want - start), name
    assert float(got["norm"]) == pytest.approx(square**0.5, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_factored_second_moment_follows_its_equation(ranks: Any, stage: int) -> None:
    """Matrices of whole blocks during the backward pass, others at its end."""
    seen = [[gradients(step, rank) for rank in range(len(ranks))] for step in range(STEPS)]
    for name, p in Model().named_parameters():
        mean = [np.mean([by_rank[name].double().numpy() for by_rank in step], axis=0) for step in seen]
        start = p.detach().double().numpy()
        want = follow(FACTORED, 1e-2, DECAY if p.dim() > 1 else 0.0, start, mean)
        error = np.linalg.norm(ranks[0][f"factored-fp32-{stage}"]["weights"][name].double().numpy() - want)
        assert error < 1e-5 * np.linalg.norm(want - start), name


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        *((kind, stage) for kind in ("", "factored-") for stage in STAGES),
        *((f"{rule}-", stage) for rule, stages in WHOLE.items() for stage in stages),
    ],
)
def test_release_changes_no_bit_of_bf16_weights_and_state(ranks: Any, stage: int, kind: str) -> None:
    for rank in ranks:
        held, released = (rank[f"{kind}bf16-{stage}-{released}"] for released in (False, True))
        assert held["bytes"] == released["bytes"]
        for name, value in held["weights"].items():
            assert torch.equal(released["weights"][name], value), name
        lines, same = (
            sorted(sorted(x.tolist()) for one in case["small"] for x in one.values()) for case in (held, released)
        )
        assert lines == same, "in whatever order groups were begun"
        assert bool(lines) == (kind in ("factored-", "Adafactor8-", "NorMuon-"))


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        *((kind, stage) for kind in ("", "factored-") for stage in STAGES),
        *((f"{rule}-", stage) for rule, stages in WHOLE.items() for stage in stages),
    ],
)
def test_offload_of_what_is_released_changes_no_bit(ranks: Any, stage: int, kind: str) -> None:
    ways = ["offloaded", *(["in files"] if kind == "factored-" else [])]
    ways += ["weights, too"] if (kind, stage) == ("factored-", 3) else []
    for rank in ranks:
        released = rank[f"{kind}bf16-{stage}-True"]
        for way in ways:
            moved = rank[f"{kind}bf16-{stage}-{way}"]
            assert moved["bytes"] == released["bytes"] and moved["norm"] == released["norm"]
            for name, value in released["weights"].items():
                assert torch.equal(moved["weights"][name], value), name


def test_a_step_that_is_skipped_half_way_is_counted_on_all_ranks_or_on_none(tmp_path: Path) -> None:
    """One rank has applied the gradient of its matrix when the other one's turns out to be NaN."""
    made = {kind: factored(2, True, "8bit", bf16={"enabled": True}) for kind in ("factored", "whole")}
    made["whole"]["optimizer"]["params"]["state_format"] = "8bit"
    made["joined"] = made["whole"] | {"zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6}}
    made["stage-3"] = made["whole"] | {"zero_optimization": {"stage": 3, "reduce_bucket_size": 3000}}
    made["lost"] = made["stage-3"]  # where the loss is NaN, no gradient is finite
    first, second = launch(tmp_path, 2, Path(__file__).with_name("release_worker.py"), {"cases": made})
    kept = [rank["joined"]["kept"] for rank in (first, second)]
    assert sum(kept) >= 2 * 300, "the norm's gradient waits"
    assert kept == [rank["joined"]["waiting"] for rank in (first, second)], "and nothing of its bucket with it"
    for kind in ("factored", "whole", "stage-3"):
        one, other = first[kind], second[kind]
        assert one["skipped"] == other["skipped"] == 1
        assert set(one["steps"]) == set(other["steps"]) == {2}, "one count, whatever a tensor has in another layout"
        skipped, done = (sorted(map(sorted, states)) for states in one["allocated"])
        assert skipped == done, "a checkpoint of the skipped step has the state of all groups"
        for key in ("rows", "weights"):
            assert all(
                torch.equal(x, y) and bool(x.isfinite().all()) for x, y in zip(one[key], other[key], strict=True)
            )
    assert len(first["factored"]["rows"]) == 1 and not first["whole"]["rows"]
    torch.manual_seed(0)
    start = [weight.detach() for _, weight in sorted(Halves().bfloat16().float().named_parameters())]
    changed = {name: differ(first[name]["after the first"], start) for name in ("whole", "stage-3", "lost")}
    assert changed == {"whole": [False, True, False], "stage-3": [False, True, False], "lost": [False] * 3}
    assert first["lost"]["steps"] == [1, 1], "the first step is not counted"


def test_a_gradient_that_is_all_of_a_bucket_is_not_overwritten_while_it_waits(tmp_path: Path) -> None:
    """Alone at stage 3 a rank keeps the buffer of DeepSpeed's bucket itself, into which the next gradient is put."""
    made = factored(3, True, "8bit", bf16={"enabled": True})
    made["optimizer"]["params"]["state_format"] = "8bit"
    made["zero_optimization"]["reduce_bucket_size"] = 64 * 64  # a matrix
    cases = {"at once": made, "delayed": made, "moved": offloaded(made, offload_param={"device": "cpu"})}
    settings = {"cases": cases, "factors": [2.0, 3.0]}
    [found] = launch(tmp_path, 1, Path(__file__).with_name("release_worker.py"), settings)
    for kind in ("after the first", "weights"):
        assert differ(found["at once"][kind], found["delayed"][kind]) == [False] * 3
        assert differ(found["at once"][kind], found["moved"][kind]) == [False] * 3


def differ(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[bool]:
    return [not torch.equal(x, y) for x, y in zip(one, other, strict=True)]
