"""AdaMuon: orthogonal signs, a rate for each element."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor

from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.orthogonal import NormalizedRule
from toolkit.optim.rule import Matrix, Mean, NonNegative, State


class AdaMuonRule(NormalizedRule):
    """AdaMuon (Si et al. 2025) for hidden matrices; embeddings, head, norms and biases are trained with AdamW.

    ::

        m     <- b1 m + (1 - b1) g
        o     =  Newton-Schulz(sign(m))                      five steps on the whole matrix
        v     <- b2 v + (1 - b2) o^2                         elementwise
        u     =  o / (sqrt(v) + eps)
        theta <- theta - eta wd theta - 0.2 eta u / rms(u)   rms over the matrix

    `coefficients` are "muon" or "polar-express". AdamW has `adamw_lr` (without it `lr`), `adamw_betas` and `adamw_eps`.
    """

    states = (State("m"), State("v", signed=False))
    statistics = (Matrix("o"), Mean("u2", over="parameter"))
    update_error = MappingProxyType({"8bit": 15.5, "compact": 52.6, "minimal": 55.7})
    loss_price = MappingProxyType({"8bit": (0.002, 0.002)})

    eps: NonNegative = 1e-8

    @staticmethod
    def direction(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, **s: Tensor) -> Tensor:
        return (m + s["rate"] * (g - m)).sign()

    @staticmethod
    def measure(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, *, o: Tensor, **s: Tensor) -> Tensor:
        v = v + s["rate2"] * (o * o - v)
        return (o / (v.sqrt() + s["eps"])) ** 2

    @staticmethod
    def update(
        theta: Tensor, g: Tensor, m: Tensor, v: Tensor, *, o: Tensor, u2: Tensor, **s: Tensor
    ) -> tuple[Tensor, ...]:
        v = v + s["rate2"] * (o * o - v)
        u = o / (v.sqrt() + s["eps"])
        # Of a gradient that is all 0, u is 0, too.
        step = s["step"] * u2.clamp(min=1e-30).rsqrt()
        return theta - (s["decay"] * theta + step * u), m + s["rate"] * (g - m), v


AdaMuon = as_optimizer(AdaMuonRule)
