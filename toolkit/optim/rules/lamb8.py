"""Lamb8: Adam with rates relative to tensors' sizes."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Beta, Mean, NonNegative, Rule, SecondBeta, State


class Lamb8Rule(Rule):
    """LAMB (You et al. 2020).

    ::

        m     <- b1 m + (1 - b1) g
        v     <- b2 v + (1 - b2) g^2
        u     =  (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd theta
        trust =  |theta| / |u|                      norms over the parameter; 1 where one of them is 0
        theta <- theta - eta min(max(trust, min_coeff), max_coeff) u

    `betas` is (b1, b2). `min_coeff` and `max_coeff` are DeepSpeed's names and values.
    """

    states = (State("m"), State("v", signed=False))
    statistics = (Mean("theta2", over="parameter"), Mean("u2", over="parameter"))
    update_error = MappingProxyType({"8bit": 4.2, "compact": 34.5, "minimal": 40.6})
    loss_price = MappingProxyType({"8bit": (0.003, 0.009)})

    lr: NonNegative = 1e-3
    betas: tuple[Beta, SecondBeta] = (0.9, 0.999)
    eps: NonNegative = 1e-6
    weight_decay: NonNegative = 0.01
    min_coeff: NonNegative = 0.01
    max_coeff: NonNegative = 10.0

    def scalars(self, t: int) -> dict[str, float]:
        b1, b2 = self.betas
        return {
            "lr": self.lr,
            "decay": self.weight_decay,
            "eps": self.eps,
            "m_rate": 1.0 - b1,
            "v_rate": 1.0 - b2,
            "m_correction": 1.0 / (1.0 - b1**t),
            "v_correction": (1.0 - b2**t) ** -0.5,
            "least": self.min_coeff,
            "most": self.max_coeff,
        }

    @staticmethod
    def direction(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, **s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, and the new m and v."""
        m = m + s["m_rate"] * (g - m)
        v = v + s["v_rate"] * (g * g - v)
        return s["m_correction"] * m / (v.sqrt() * s["v_correction"] + s["eps"]) + s["decay"] * theta, m, v

    @staticmethod
    def measure(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        u, _, _ = Lamb8Rule.direction(theta, g, m, v, **s)
        return theta * theta, u * u

    @staticmethod
    def update(
        theta: Tensor, g: Tensor, m: Tensor, v: Tensor, *, theta2: Tensor, u2: Tensor, **s: Tensor
    ) -> tuple[Tensor, ...]:
        u, m, v = Lamb8Rule.direction(theta, g, m, v, **s)
        known = (theta2 > 0) & (u2 > 0)
        trust = torch.where(known, (theta2 / torch.where(known, u2, 1.0)).sqrt(), 1.0)
        return theta - s["lr"] * torch.minimum(torch.maximum(trust, s["least"]), s["most"]) * u, m, v


Lamb8 = as_optimizer(Lamb8Rule)
