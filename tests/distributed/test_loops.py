"""Loops of one's own that do more than forward pass, backward pass and step: right, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import launch

KINDS = {
    "weights_set": ("0", "1", "2bf16", "2offload", "3", "3bf16", "3cut"),
    "state_set": ("1", "2bf16", "3cut"),
    "gradients_set": ("1", "2offload", "3cut"),
    "twice": ("1", "2bf16", "3", "3cut"),
    "adversarial": ("1", "2bf16", "3"),
    "odd": ("0", "1", "2", "3"),
    "scaled": ("0fp16", "2fp16"),
    "refused": ("1", "2released", "3", "3released"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank found, by loop and kind (the ZeRO stage and what else)."""
    steps = [{loop: kind} for loop, kinds in KINDS.items() for kind in kinds]
    worker = Path(__file__).with_name("loops_worker.py")
    ranks = launch(tmp_path_factory.mktemp("loops"), 2, worker, {"steps": steps})
    names = [f"{loop}-{kind}" for loop, kinds in KINDS.items() for kind in kinds]
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(names)}


def near(kind: str) -> float:
    return 1e-4 if len(kind) == 1 else 0.2  # bf16 rounds what the model computes


@pytest.mark.parametrize("kind", KINDS["weights_set"])
def test_weights_that_are_set_are_all_ranks_at_once(runs: dict[str, Any], kind: str) -> None:
    for rank in runs[f"weights_set-{kind}"]:
        assert rank["at once"] and rank["read"]
        got, wanted = rank["losses"]
        assert got == pytest.approx(wanted, rel=1e-5 if len(kind) == 1 else 0.01)
        assert rank["off"] < near(kind)


@pytest.mark.parametrize("kind", KINDS["state_set"])
def test_state_that_is_set_is_that_of_the_next_step(runs: dict[str, Any], kind: str) -> None:
    for rank in runs[f"state_set-{kind}"]:
        assert rank["read"]
        assert rank["off"] < near(kind)
        assert rank["said"] == "AdamW8 keeps no state 'mm' of each element here; it keeps m, v. Did you mean 'm'?"


@pytest.mark.parametrize("kind", KINDS["gradients_set"])
def test_gradients_that_are_set_are_those_of_the_step(runs: dict[str, Any], kind: str) -> None:
    for rank in runs[f"gradients_set-{kind}"]:
        assert rank["read"] < (1e-6 if len(kind) == 1 else 0.01)
        assert rank["off"] < near(kind)
        assert rank["said"].startswith("gradients are there from the backward pass")


@pytest.mark.parametrize("kind", KINDS["twice"])
def test_a_graph_is_passed_twice_and_a_bad_batch_is_dropped(runs: dict[str, Any], kind: str) -> None:
    for rank in runs[f"twice-{kind}"]:
        assert rank["off"] < near(kind)


@pytest.mark.parametrize("kind", KINDS["adversarial"])
def test_two_engines_train_against_each_other(runs: dict[str, Any], kind: str) -> None:
    for rank in runs[f"adversarial-{kind}"]:
        assert rank["off"] < near(kind)


@pytest.mark.parametrize("kind", KINDS["odd"])
def test_unusual_parameters_and_loops_train_as_without_deepspeed(runs: dict[str, Any], kind: str) -> None:
    for rank in runs[f"odd-{kind}"]:
        assert rank["off"] < near(kind)


@pytest.mark.parametrize("kind", KINDS["scaled"])
def test_a_loss_scale_that_is_too_large_skips_steps_and_changes_none(runs: dict[str, Any], kind: str) -> None:
    for rank in runs[f"scaled-{kind}"]:
        assert 0 < rank["made"] < 9
        assert rank["off"] < 0.05
        assert rank["norms"] == pytest.approx([1.0] * rank["made"], rel=0.02)


@pytest.mark.parametrize("kind", KINDS["refused"])
def test_what_would_train_wrongly_is_refused(runs: dict[str, Any], kind: str) -> None:
    says = {
        "group": "add_param_group after the engine was made",
        "second": "inp.weight, inp.bias, norm.weight and 5 more: trained under ZeRO by another engine already",
        "dropped": "zero_grad between a backward pass and its step comes too late",
        "gradient": "the gradient of mlp.weight is gone",
        "scalar": "parameter '0' has no dimensions",
        "memory": "0.weight and 1.weight are two parameters in one memory",
        "state_format": "AdamW8, parameter group 0: state_format was 'm fp32, v fp32' when the optimizer was made",
        "weights": "AdamW8, parameter group 0: weights was ",
        "no_sync": "engine.no_sync() works at stage 0 only",
        "engine": "an engine cannot be copied",
        "model": "parameter 'inp.weight' cannot be copied at stage 3",
        "parts": "'mlp.weight': its gradient comes in parts",
        "mixed": "stage 3 trains parameters of one type, but ",
    }
    for rank in runs[f"refused-{kind}"]:
        assert len(rank) == 8 + 3 * (kind[0] == "3")
        for name, text in rank.items():
            assert text.startswith(says[name]) and "\n" not in text
