"""Released gradients with a rule that keeps no state: LOMO, whose equations are all there is to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plugins_worker import Model, gradients
from ranks import launch
from references import follow

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


def cases() -> dict[str, dict[str, Any]]:
    made = {}
    for stage in (1, 2):
        made[f"fp32-{stage}"] = config(stage, True)
        for released in (False, True):
            made[f"bf16-{stage}-{released}"] = config(stage, released, bf16={"enabled": True})
    return {name: {"config": one, "steps": STEPS, "same": False, "warm": False} for name, one in made.items()}


@pytest.fixture(scope="module", params=[2, pytest.param(1, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank wrote."""
    worker = Path(__file__).with_name("plugins_worker.py")
    folder = tmp_path_factory.mktemp("release")
    return launch(folder, request.param, worker, {"plugins": [], "cases": cases()})


@pytest.mark.parametrize("stage", [1, 2])
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


@pytest.mark.parametrize("stage", [1, 2])
def test_release_changes_no_bit_of_bf16_weights_and_remainders(ranks: Any, stage: int) -> None:
    held, released = (ranks[0][f"bf16-{stage}-{released}"] for released in (False, True))
    assert held["bytes"] == released["bytes"]
    for name, value in held["weights"].items():
        assert torch.equal(released["weights"][name], value), name
