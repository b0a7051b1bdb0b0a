"""Sequence parallelism in a loop of one's own: ranks that share sequences against ranks that have them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch

WORKER = Path(__file__).with_name("sequence_worker.py")
STEPS = 3


def config(rule: str, stage: int, **more: Any) -> dict[str, Any]:
    """In fp32, so that sums in another order differ by little."""
    params = {"lr": 1e-2, "state_format": "fp32", "compile": False}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": rule, "params": params},
        "steps_per_print": 10**9,
    } | more


def trained(folder: Path, ranks: int, sharing: int, cases: list[tuple[str, int]]) -> list[dict[str, Any]]:
    steps = [{"train": config(*case), "steps": STEPS, "sharing": sharing} for case in cases]
    results: list[dict[str, Any]] = launch(folder, ranks, WORKER, {"steps": steps})[0]
    return results


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_share_sequences_train_as_ranks_that_have_them_whole(tmp_path: Path, ranks: int) -> None:
    """At stage 3 DeepSpeed divides gradients by all ranks, those that share a sequence among them: half of them."""
    cases = [("AMCS", 1), ("AMCS", 3), ("Muon8", 2), ("Muon8", 3)]
    shared = trained(tmp_path / "shared", ranks, 2, cases)
    whole = trained(tmp_path / "whole", ranks // 2, 1, cases)
    for case, mine, theirs in zip(cases, shared, whole, strict=True):
        share = 0.5 if case[1] == 3 else 1.0
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5), case
        assert mine["norms"] == pytest.approx([share * norm for norm in theirs["norms"]], rel=1e-4), case
        assert min(theirs["norms"]) > 1.0, "gradients are clipped, also half of them"
        assert len(theirs["weights"]) == 7 and mine["weights"].keys() == theirs["weights"].keys()
        for name, weight in mine["weights"].items():
            torch.testing.assert_close(weight, theirs["weights"][name], rtol=1e-3, atol=1e-4, msg=f"{case} {name}")


def test_sequences_shared_by_a_mesh_are_refused_since_no_gradients_are_added_up_over_it(tmp_path: Path) -> None:
    sizes = {"data_parallel_size": 1, "sequence_parallel_size": 2}
    steps = [{"refused": config("Muon8", stage), "keys": sizes} for stage in (1, 3)]
    steps += [{"refused": config("Muon8", 2), "keys": {}, "mesh_param": [1, 2]}]
    for sentence in sum(launch(tmp_path, 2, WORKER, {"steps": steps})[0], []):
        assert "sequence_parallel_size is 2: DeepSpeed does not add up the gradients" in sentence
        assert "parallel_state_sp" in sentence
