"""StableAdamW (Wortsman et al. 2023), a rule with a mean over each parameter."""

import torch
from torch import Tensor

from toolkit.optim import Beta, Mean, NonNegative, Rule, State, as_optimizer


class StableAdamWRule(Rule):
    """AdamW whose rate is divided by max(1, sqrt(mean of g^2 / v over the parameter)), v being this step's."""

    states = (State("m"), State("v", signed=False))
    statistics = (Mean("rms2", over="parameter"),)

    lr: NonNegative = 1e-3
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    eps: NonNegative = 1e-6
    weight_decay: NonNegative = 0.0

    def scalars(self, t: int) -> dict[str, float]:
        b1, b2 = self.betas
        return {
            "lr": self.lr,
            "decay": self.weight_decay,
            "eps": self.eps,
            "eps2": self.eps**2,
            "rate1": (1 - b1) / (1 - b1**t),  # so that m and v need no correction for their start
            "rate2": (1 - b2) / (1 - b2**t),
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
