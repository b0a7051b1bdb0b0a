"""What the host of a GPU holds where the step runs there, and gradients are released to it or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from toolkit.config import load_config
from toolkit.estimate.predict import Case, Estimator, with_section
from toolkit.models.build import blueprint
from toolkit.records import categories as c
from toolkit.records.activations import Activations

MODEL = "qwen3-134m"
CHUNK = 1_048_576
"""Elements that a step with factored states works on at a time, on a CPU."""
BUCKET = 4_194_304


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return Estimator()


def predicted(estimator: Estimator, stage: int, ranks: int, **params: Any) -> Any:
    config = load_config(f"amcs_zero{stage}_offload")
    lean = {"state_format": "lean", "weights": "bf16"}
    config = with_section(config, ["optimizer", "params"], lean | params)
    config = with_section(config, ["zero_optimization"], {"reduce_bucket_size": BUCKET})
    return estimator.predict(Case(MODEL, config, ranks, 1, 64, device="cuda", activations=Activations(), loss="plain"))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_of_released_gradients_the_host_holds_what_waits(estimator: Estimator, stage: int, ranks: int) -> None:
    held = predicted(estimator, stage, ranks)
    released = predicted(estimator, stage, ranks, release_gradients=True)
    share = held.setup.parameters / ranks
    # A stretch of second moments in fp32, and twice rows and columns, which are 1 MB.
    assert all(one.host.pop(c.TRANSIENTS) == pytest.approx(4 * CHUNK + 2e6, rel=0.02) for one in (held, released))
    # Weights, gradients, state.
    assert sum(held.host.values()) / share == pytest.approx(2 + 2 + 1.03, rel=0.02)
    # Weights and state; the largest gradient and a bucket before it wait for their norms.
    waits = released.host.pop(c.GRADIENTS)
    largest = max(p.numel() for p in blueprint(MODEL, dtype=torch.bfloat16).parameters()) / ranks
    assert 2 * largest <= waits <= 2 * (largest + 1.2 * BUCKET)
    assert sum(released.host.values()) / share == pytest.approx(2 + 1.03, rel=0.02)
    assert released.peak <= held.peak


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_rank_gathers_weights_from_the_host_of_a_gpu_and_none_on_a_cpu(estimator: Estimator, device: str) -> None:
    case = Case(MODEL, load_config("amcs_zero3_offload_lean"), 1, 1, 64, device=device)
    gathered = [c.GATHERED in phase.held for phase in estimator.predict(case).phases]
    assert any(gathered) == (device == "cuda")


def test_what_a_step_looks_at_lies_where_it_runs(estimator: Estimator) -> None:
    """A whole matrix in fp32, for NorMuon's means."""
    config = with_section(load_config("normuon_zero2"), ["optimizer", "params"], {"release_gradients": True})
    moved = with_section(config, ["zero_optimization"], {"offload_optimizer": {"device": "cpu"}})
    here, there = (
        estimator.predict(Case(MODEL, one, 1, 1, 64, device="cuda", activations=Activations(), loss="plain"))
        for one in (config, moved)
    )
    most = max(phase.held.get(c.TRANSIENTS, 0) for phase in here.phases)
    assert not here.host and most > 10e6
    assert there.host[c.TRANSIENTS] > 10e6 and there.peak < here.peak - most


@pytest.mark.parametrize(("stage", "device"), [(2, "cuda"), (3, "cuda"), (3, "cpu")])
def test_nvme_holds_the_state_of_rules_and_the_host_the_rest(estimator: Estimator, stage: int, device: str) -> None:
    base = load_config(f"amcs_zero{stage}_offload")
    found = {}
    for place in ("nvme", "cpu"):
        config = with_section(base, ["zero_optimization"], {"offload_optimizer": {"device": place}})
        found[place] = estimator.predict(
            Case(MODEL, config, 1, 1, 64, device=device, activations=Activations(), loss="plain")
        )
    there, host = found["nvme"], found["cpu"]
    state = sum(there.nvme.values())
    assert set(there.nvme) == {"m_fast", "m_slow", "v", c.SCALES, c.REMAINDER} and not host.nvme
    assert state / there.setup.parameters == pytest.approx(4.05, rel=0.01)
    if device == "cuda":
        assert there.nvme | there.host == host.host and not there.nvme.keys() & there.host.keys()
        assert there.peak == host.peak
    else:
        assert there.peak == host.peak - state
