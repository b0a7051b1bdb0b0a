"""Lion8: the sign of a momentum."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor

from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Beta, NonNegative, Rule, State


class Lion8Rule(Rule):
    """Lion (Chen et al. 2023).

    ::

        theta <- theta - eta wd theta - eta sign(b1 m + (1 - b1) g)
        m     <- b2 m + (1 - b2) g

    `betas` is (b1, b2).
    """

    states = (State("m"),)
    update_error = MappingProxyType({"8bit": 16.4, "compact": 62.5, "minimal": 62.5})
    loss_price = MappingProxyType({"8bit": (-0.009, 0.111)})

    lr: NonNegative = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: NonNegative = 0.6

    def scalars(self, t: int) -> dict[str, float]:
        b1, b2 = self.betas
        return {"lr": self.lr, "decay": self.lr * self.weight_decay, "rate1": 1.0 - b1, "rate2": 1.0 - b2}

    @staticmethod
    def update(theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        (m,) = states
        direction = (m + s["rate1"] * (g - m)).sign()
        return theta - (s["decay"] * theta + s["lr"] * direction), m + s["rate2"] * (g - m)


Lion8 = as_optimizer(Lion8Rule)
