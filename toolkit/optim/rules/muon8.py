"""Muon8: momentum made orthogonal, for hidden matrices."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from torch import Tensor

from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.orthogonal import OrthogonalRule
from toolkit.optim.rule import Beta, Matrix, State


class Muon8Rule(OrthogonalRule):
    """Muon (Jordan et al. 2024) for hidden matrices; embeddings, head, norms and biases are trained with AdamW.

    ::

        m     <- mu m + (1 - mu) g
        o     =  Newton-Schulz(mu m + (1 - mu) g)            five steps on the whole matrix
        theta <- theta - eta wd theta - eta scale o

    `scaling` "moonlight" is scale = 0.2 sqrt(max(rows, columns)), with which o is as large as AdamW's updates are;
    "keller" is sqrt(max(1, rows / columns)). `coefficients` are "muon" or "polar-express". AdamW has `adamw_lr`
    (without it `lr`), `adamw_betas` and `adamw_eps`.
    """

    states = (State("m"),)
    statistics = (Matrix("o"),)
    chosen = MappingProxyType({"scaling": "moonlight", "coefficients": "muon"})
    update_error = MappingProxyType({"8bit": 10.8, "compact": 49.3, "minimal": 52.6})
    loss_price = MappingProxyType({"8bit": (0.005, 0.002)})

    momentum: Beta = 0.95
    scaling: Literal["moonlight", "keller"] = "moonlight"

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr, "decay": self.lr * self.weight_decay, "rate": 1.0 - self.momentum}

    @staticmethod
    def direction(theta: Tensor, g: Tensor, m: Tensor, **s: Tensor) -> Tensor:
        m = m + s["rate"] * (g - m)
        return m + s["rate"] * (g - m)

    @classmethod
    def transform(cls, matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        moonlight = cls.chosen["scaling"] == "moonlight"
        scale = 0.2 * max(rows, columns) ** 0.5 if moonlight else max(1.0, rows / columns) ** 0.5
        return scale * super().transform(matrix)

    @staticmethod
    def update(theta: Tensor, g: Tensor, m: Tensor, *, o: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return theta - (s["decay"] * theta + s["lr"] * o), m + s["rate"] * (g - m)


Muon8 = as_optimizer(Muon8Rule)
