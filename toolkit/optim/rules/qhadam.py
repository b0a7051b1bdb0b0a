"""QHAdam: Adam with part of the plain gradient."""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated

from pydantic import Field
from torch import Tensor

from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Beta, NonNegative, Rule, SecondBeta, State

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]


class QHAdamRule(Rule):
    """QHAdam (Ma and Yarats 2019): numerator and denominator are means of a momentum and of the gradient itself.

    ::

        m     <- b1 m + (1 - b1) g
        v     <- b2 v + (1 - b2) g^2
        top   =  (1 - n1) g   + n1 m / (1 - b1^t)
        below =  (1 - n2) g^2 + n2 v / (1 - b2^t)
        theta <- theta - eta wd theta - eta top / (sqrt(below) + eps)

    `betas` is (b1, b2), `nus` is (n1, n2). With nus (1, 1) it is AdamW.
    """

    states = (State("m"), State("v", signed=False))
    update_error = MappingProxyType({"8bit": 5.0, "compact": 31.4, "minimal": 39.8})
    loss_price = MappingProxyType({"8bit": (-0.002, 0.017)})

    lr: NonNegative = 6e-4
    betas: tuple[Beta, SecondBeta] = (0.995, 0.999)
    nus: tuple[Share, Share] = (0.7, 1.0)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.1

    def scalars(self, t: int) -> dict[str, float]:
        (b1, b2), (n1, n2) = self.betas, self.nus
        return {
            "lr": self.lr,
            "decay": self.lr * self.weight_decay,
            "eps": self.eps,
            "rate1": 1.0 - b1,
            "rate2": 1.0 - b2,
            "g_share": 1.0 - n1,
            "m_share": n1 / (1.0 - b1**t),
            "g2_share": 1.0 - n2,
            "v_share": n2 / (1.0 - b2**t),
        }

    @staticmethod
    def update(theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        m, v = states
        m = m + s["rate1"] * (g - m)
        v = v + s["rate2"] * (g * g - v)
        below = (s["g2_share"] * g * g + s["v_share"] * v).sqrt() + s["eps"]
        step = (s["g_share"] * g + s["m_share"] * m) / below
        return theta - (s["decay"] * theta + s["lr"] * step), m, v


QHAdam = as_optimizer(QHAdamRule)
