"""What of an optimizer's state is counted once, however many ranks hold it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import BASE, Net, build, step
from torch import nn

import toolkit
from toolkit.state.codecs import BLOCK
from toolkit.zero.engine import optimizer_state_bytes, replicated_bytes


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("more", "whole"),
    [
        ({"zero_optimization": {"stage": 1}}, {"v_row"}),
        ({"zero_optimization": {"stage": 3}}, {"v_row"}),
        ({"bf16": {"enabled": False}}, {"m", "v", "v_row"}),
    ],
    ids=["stage 1", "stage 3", "stage 0"],
)
def test_states_of_rows_are_whole_on_every_rank_and_without_zero_all_are(more: dict[str, Any], whole: set[str]) -> None:
    engine = build(BASE | {"optimizer": {"type": "NorMuon", "params": {"lr": 1e-3, "compile": False}}} | more)
    step(engine)
    held = optimizer_state_bytes(engine)
    assert replicated_bytes(engine) == sum(held[name] for name in whole)
    assert held["v_row"] == 4 * (40 + 8), "one fp32 number for each row of the two matrices"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [1, 3])
def test_what_stands_for_a_factored_state_is_whole_on_every_rank(stage: int) -> None:
    params = {"lr": 1e-3, "compile": False, "state_format": "factored"}
    more: dict[str, Any] = {"zero_optimization": {"stage": stage}, "optimizer": {"type": "AdamW8", "params": params}}
    engine = build(BASE | more)
    step(engine)
    held = optimizer_state_bytes(engine)
    assert replicated_bytes(engine) == 4 * (40 + 24 + 8 + 40), "rows and columns of the two matrices"
    assert held["v"] - replicated_bytes(engine) == 4 * 2 * BLOCK, "1-D parameters, 128 elements in all, are exact"


def test_a_matrix_without_elements_has_factors_of_none(one_rank: None) -> None:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Parameter(torch.empty(0, 5))

    params = {"lr": 1e-3, "compile": False, "state_format": "factored", "weights": "bf16+16"}
    config = BASE | {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW8", "params": params}}
    plain = build(config)
    torch.manual_seed(0)
    engine, *_ = toolkit.initialize(model=Odd(), config=config)
    for one in (plain, engine):
        torch.manual_seed(1)
        step(one)
    others = {name: p for name, p in engine.module.named_parameters() if name != "nothing"}
    for name, p in plain.module.named_parameters():
        assert torch.equal(others[name], p), name
