"""Rules with a whole matrix: what is measured of it, and which rank transforms which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toolkit.optim import RULES, Matrix, Mean, NonNegative, Rule, State, as_optimizer
from toolkit.optim.matrices import rounds


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class MeasuredRule(Rule):
    """A small state follows what is measured after the matrix, whose direction is given what was measured before."""

    states = (State("r", of="rows"),)
    statistics = (Mean("size", over="model"), Mean("row", over="row", by="measure_matrix"), Matrix("o"))

    lr: NonNegative = 0.1

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr}

    @staticmethod
    def measure(theta: Tensor, g: Tensor, **s: Tensor) -> Tensor:
        return g * g

    @staticmethod
    def direction(theta: Tensor, g: Tensor, **s: Tensor) -> Tensor:
        return g / s["size"].sqrt()

    @staticmethod
    def transform(matrix: Tensor) -> Tensor:
        return matrix.roll(1, 0)

    @staticmethod
    def measure_matrix(theta: Tensor, g: Tensor, *, o: Tensor, **s: Tensor) -> Tensor:
        return 2.0 * o

    @staticmethod
    def follow(r: Tensor, *, row: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (r + row,)

    @staticmethod
    def update(theta: Tensor, g: Tensor, *, o: Tensor, r: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (theta - (r + o),)


def test_what_is_measured_of_a_matrix_comes_after_it() -> None:
    params = [nn.Parameter(torch.zeros(2, columns)) for columns in (8, 300)]
    optimizer: Any = as_optimizer(MeasuredRule)(params, compile=False)
    for value in (3.0, 0.5):
        for p in params:
            p.grad = torch.tensor([[value], [-value]]).expand_as(p).clone()
        optimizer.step()
    # Both steps: o is -1 and 1, its rows' means -2 and 2, so r is -2 and 2, then -4 and 4.
    for p in params:
        assert torch.equal(p, torch.tensor([[8.0], [-8.0]]).expand_as(p)), p
        assert optimizer.state[p]["r"].tolist() == [-4.0, 4.0]


def test_matrices_are_shared_out_evenly_and_no_round_holds_more_than_the_largest() -> None:
    sizes = [100, 7, 60, 60, 3, 99, 1, 50]
    for ranks in (1, 2, 3, 4):
        made = rounds(sizes, ranks)
        assert sorted(number for now in made for number, _ in now) == list(range(len(sizes)))
        loads = [0] * ranks
        for now in made:
            for rank in range(ranks):
                mine = sum(sizes[number] for number, owner in now if owner == rank)
                loads[rank] += mine
                assert mine <= max(sizes)
        assert max(loads) - min(loads) <= max(sizes)
