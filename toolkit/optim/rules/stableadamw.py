"""StableAdamW: AdamW with update clipping by tensor."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Beta, Mean, NonNegative, Rule, SecondBeta, State


class StableAdamWRule(Rule):
    """StableAdamW (Wortsman et al. 2023): the rate of a parameter falls where its g^2 runs ahead of v.

    ::

        m     <- b1(t) m + (1 - b1(t)) g,      b(t) = b (1 - b^(t-1)) / (1 - b^t)
        v     <- b2(t) v + (1 - b2(t)) g^2
        rms   =  sqrt(mean(g^2 / max(v, eps^2)))                                  over the parameter
        theta <- theta - rho wd theta - rho m / (sqrt(v) + eps),      rho = eta / max(1, rms)

    `betas` is (b1, b2). Where rms stays below 1 it is AdamW.
    """

    states = (State("m"), State("v", signed=False))
    statistics = (Mean("rms2", over="parameter"),)
    update_error = MappingProxyType({"8bit": 3.4, "compact": 35.8, "minimal": 42.3})
    loss_price = MappingProxyType({"8bit": (0.002, 0.003)})

    lr: NonNegative = 6e-4
    betas: tuple[Beta, SecondBeta] = (0.9, 0.99)
    eps: NonNegative = 1e-6
    weight_decay: NonNegative = 0.1

    def scalars(self, t: int) -> dict[str, float]:
        b1, b2 = self.betas
        return {
            "lr": self.lr,
            "decay": self.weight_decay,
            "eps": self.eps,
            "eps2": self.eps**2,
            "rate1": (1.0 - b1) / (1.0 - b1**t),  # 1 - b1(t)
            "rate2": (1.0 - b2) / (1.0 - b2**t),
        }

    @staticmethod
    def measure(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, **s: Tensor) -> Tensor:
        v = v + s["rate2"] * (g * g - v)
        return g * g / torch.maximum(v, s["eps2"])

    @staticmethod
    def update(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, *, rms2: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        m = m + s["rate1"] * (g - m)
        v = v + s["rate2"] * (g * g - v)
        rate = s["lr"] / rms2.sqrt().clamp(min=1.0)
        return theta - rate * (s["decay"] * theta + m / (v.sqrt() + s["eps"])), m, v


StableAdamW = as_optimizer(StableAdamWRule)
