"""What of an optimizer's state is counted once, however many ranks hold it."""

from __future__ import annotations

from typing import Any

import pytest
from engines import BASE, build, step

from toolkit.zero.engine import optimizer_state_bytes, replicated_states


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
    assert replicated_states(engine) == whole
    assert optimizer_state_bytes(engine)["v_row"] == 4 * (40 + 8), "one fp32 number for each row of the two matrices"
