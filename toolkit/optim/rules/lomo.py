"""LOMO: plain gradient descent, no state."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import NonNegative, Rule, State


class LOMORule(Rule):
    """LOMO (Lv et al. 2023): gradient descent; with `release_gradients` no gradient outlives its update.

    ::

        theta <- theta - eta wd theta - eta g
    """

    states: ClassVar[tuple[State, ...]] = ()
    update_error = MappingProxyType({"8bit": 0.0, "compact": 0.0, "minimal": 0.0})

    lr: NonNegative = 3e-2
    weight_decay: NonNegative = 0.0

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr, "decay": self.lr * self.weight_decay}

    @staticmethod
    def update(theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (theta - (s["decay"] * theta + s["lr"] * g),)


LOMO = as_optimizer(LOMORule)
