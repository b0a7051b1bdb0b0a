"""`--deterministic`: what is set before CUDA can start, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch
import torch._inductor.config

from toolkit import train
from toolkit.errors import UserError
from toolkit.run import ranks
from toolkit.run.deterministic import explained
from toolkit.run.settings import RunSettings


class Started(Exception):
    """The ranks have been started, where CUDA would be."""


@pytest.fixture(autouse=True)
def nothing_is_left_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def start() -> NoReturn:
        raise Started

    monkeypatch.setattr(ranks, "start", start)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # so that what the run sets is taken back
        monkeypatch.delenv(name)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with torch._inductor.config.patch(deterministic=False):
        yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("asked", [False, True])
def test_all_is_set_before_the_ranks_start(asked: bool) -> None:
    with pytest.raises(Started):
        train.train(RunSettings(deterministic=asked))
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if asked else None)
    assert os.environ.get("NCCL_ALGO") == ("^NVLS,NVLSTree" if asked else None)
    assert torch.are_deterministic_algorithms_enabled() == torch._inductor.config.deterministic == asked
    assert torch.utils.deterministic.fill_uninitialized_memory != asked


def test_what_the_user_set_is_kept_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with pytest.raises(Started):
        train.train(RunSettings(deterministic=True))
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":16:8", "Ring")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    with pytest.raises(UserError, match="needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8, which the .* ':4096:2'"):
        train.train(RunSettings(deterministic=True))


def test_only_what_torch_says_of_determinism_is_explained() -> None:
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2).put_(torch.tensor([1]), torch.ones(1))
    told = explained(caught.value)
    assert told is not None and "put_ has no deterministic implementation" in str(told)
    assert explained(RuntimeError("shapes do not fit")) is None
