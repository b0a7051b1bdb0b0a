"""AdEMAMix: Adam with a second momentum that is very slow."""

from __future__ import annotations

import math
from types import MappingProxyType

from pydantic import Field
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Beta, NonNegative, Rule, SecondBeta, State


class AdEMAMixRule(Rule):
    """AdEMAMix (Pagliardini, Ablin and Grangier 2024).

    ::

        m1    <- b1 m1 + (1 - b1) g
        m2    <- b3(t) m2 + (1 - b3(t)) g
        v     <- b2 v + (1 - b2) g^2
        theta <- theta - eta wd theta - eta (m1 / (1 - b1^t) + a(t) m2) / (sqrt(v / (1 - b2^t)) + eps)

        a(t)  =  alpha min(t / T_a, 1)
        b3(t) =  min(b3, exp(ln b1 ln b3 / ((1 - t / T_b) ln b3 + (t / T_b) ln b1)))

    `betas` is (b1, b2, b3). `alpha_warmup` is T_a and `beta3_warmup` is T_b, in optimizer steps; those not given are
    `total_steps`, 0 is no warm-up. With alpha 0 it is AdamW.
    """

    states = (State("m1"), State("m2"), State("v", signed=False))
    needs = ("total_steps",)
    update_error = MappingProxyType({"8bit": 5.0, "compact": 35.8, "minimal": 45.7})
    loss_price = MappingProxyType({"8bit": (-0.024, 0.03)})

    lr: NonNegative = 6e-4
    betas: tuple[Beta, SecondBeta, Beta] = (0.9, 0.999, 0.9999)
    alpha: NonNegative = 8.0
    alpha_warmup: int | None = Field(default=None, ge=0, strict=True)
    beta3_warmup: int | None = Field(default=None, ge=0, strict=True)
    total_steps: int | None = Field(default=None, ge=1, strict=True)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.1

    def check_ready(self) -> None:
        if None in (self.alpha_warmup, self.beta3_warmup) and self.total_steps is None:
            raise UserError(
                "AdEMAMix: total_steps is required because the warm-ups of alpha and beta3 last as long as the "
                "training; give total_steps (toolkit.initialize fills it in from the run) or alpha_warmup and "
                "beta3_warmup"
            )

    def alpha_at(self, t: int) -> float:
        """a(t) for optimizer step t = 1, 2, ..."""
        steps = self.total_steps if self.alpha_warmup is None else self.alpha_warmup
        return self.alpha * (min(t / steps, 1.0) if steps else 1.0)

    def beta3_at(self, t: int) -> float:
        """b3(t) for optimizer step t = 1, 2, ..."""
        first, last = self.betas[0], self.betas[2]
        steps = self.total_steps if self.beta3_warmup is None else self.beta3_warmup
        if not steps or t >= steps or not 0.0 < first < last:
            return last
        begin, end, done = math.log(first), math.log(last), t / steps
        return min(last, math.exp(begin * end / ((1.0 - done) * end + done * begin)))

    def scalars(self, t: int) -> dict[str, float]:
        b1, b2, _ = self.betas
        return {
            "lr": self.lr,
            "decay": self.lr * self.weight_decay,
            "eps": self.eps,
            "m1_rate": 1.0 - b1,
            "m2_rate": 1.0 - self.beta3_at(t),
            "v_rate": 1.0 - b2,
            "m1_correction": 1.0 / (1.0 - b1**t),
            "v_correction": (1.0 - b2**t) ** -0.5,
            "alpha": self.alpha_at(t),
        }

    @staticmethod
    def update(theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        m1, m2, v = states
        m1 = m1 + s["m1_rate"] * (g - m1)
        m2 = m2 + s["m2_rate"] * (g - m2)
        v = v + s["v_rate"] * (g * g - v)
        m = s["m1_correction"] * m1 + s["alpha"] * m2
        step = m / (v.sqrt() * s["v_correction"] + s["eps"])
        return theta - (s["decay"] * theta + s["lr"] * step), m1, m2, v

    def report(self, t: int) -> dict[str, float]:
        return {"alpha": self.alpha_at(t), "beta3": self.beta3_at(t)}


AdEMAMix = as_optimizer(AdEMAMixRule)
