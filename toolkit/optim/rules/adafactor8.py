"""Adafactor8: a second moment of rows and columns only."""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated

from pydantic import Field
from torch import Tensor

from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Mean, NonNegative, Rule, State

NonPositive = Annotated[float, Field(le=0, allow_inf_nan=False, strict=True)]


class Adafactor8Rule(Rule):
    """Adafactor (Shazeer and Stern 2018) without momentum; a vector is one row.

    ::

        r     <- b(t) r + (1 - b(t)) (mean of g^2 + eps1 over each row),         b(t) = 1 - t^beta2_decay
        c     <- b(t) c + (1 - b(t)) (mean of g^2 + eps1 over each column)
        u     =  g / sqrt(r c / mean(r))
        theta <- theta - eta wd theta - max(eps2, rms(theta)) min(eta, t^-1/2) u / max(1, rms(u) / d)

    `eps` is (eps1, eps2). The keywords are those of torch.optim.Adafactor.
    """

    states = (State("r", of="rows"), State("c", of="columns"))
    statistics = (
        Mean("row", over="row"),
        Mean("column", over="column"),
        Mean("theta2", over="parameter"),
        Mean("ratio2", over="parameter", by="measure_step"),
        Mean("mean_r", over="parameter", by="measure_step"),
    )
    update_error = MappingProxyType({"8bit": 0.0, "compact": 0.0, "minimal": 0.0})

    lr: NonNegative = 1e-2
    beta2_decay: NonPositive = -0.8
    eps: tuple[NonNegative, NonNegative] = (1e-30, 1e-3)
    d: NonNegative = 1.0
    weight_decay: NonNegative = 0.0

    def scalars(self, t: int) -> dict[str, float]:
        return {
            "rate": min(self.lr, t**-0.5),
            "decay": self.lr * self.weight_decay,
            "rate2": t**self.beta2_decay,
            "eps1": self.eps[0],
            "eps2": self.eps[1],
            "d": self.d,
        }

    @staticmethod
    def measure(theta: Tensor, g: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        g2 = g * g + s["eps1"]
        return g2, g2, theta * theta

    @staticmethod
    def follow(r: Tensor, c: Tensor, *, row: Tensor, column: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return r + s["rate2"] * (row - r), c + s["rate2"] * (column - c)

    @staticmethod
    def measure_step(theta: Tensor, g: Tensor, *, r: Tensor, c: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (g * r.rsqrt() * c.rsqrt()) ** 2, r

    @staticmethod
    def update(theta: Tensor, g: Tensor, *, r: Tensor, c: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        u = g * r.rsqrt() * c.rsqrt() * s["mean_r"].sqrt()
        rms = (s["mean_r"] * s["ratio2"]).sqrt()
        rate = s["rate"] * s["theta2"].sqrt().maximum(s["eps2"]) / (rms / s["d"]).clamp(min=1.0)
        return (theta - (s["decay"] * theta + rate * u),)


Adafactor8 = as_optimizer(Adafactor8Rule)
