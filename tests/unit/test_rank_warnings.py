"""What every rank has to warn of alike, one rank says."""

from __future__ import annotations

import logging

import pytest
from torch import nn

from toolkit.optim import param_groups


@pytest.mark.parametrize(("rank", "times"), [(None, 1), ("0", 1), ("1", 0)])
def test_one_rank_warns_of_unplaced_parameters(
    rank: str | None, times: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.WARNING, logger="toolkit"):
        param_groups(nn.ModuleDict({"strange": nn.Linear(4, 4)}))
    assert sum("in no known component" in record.getMessage() for record in caplog.records) == times
    assert all(record.filename == "components.py" for record in caplog.records)
