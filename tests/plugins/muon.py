"""Muon (Jordan et al. 2024), a rule that transforms whole matrices, with AdamW for all else."""

from typing import Any

from torch import Tensor

from toolkit.optim import Beta, Matrix, NonNegative, Rule, State, as_optimizer


class MuonRule(Rule):
    """Momentum, made orthogonal by five Newton-Schulz steps, of hidden matrices; all else is trained with AdamW.

    m     <- mu m + (1 - mu) g
    theta <- theta - lr wd theta - lr sqrt(max(1, rows / columns)) orthogonal(mu m + (1 - mu) g)
    """

    states = (State("m"),)
    statistics = (Matrix("o"),)

    lr: NonNegative = 1e-3
    momentum: Beta = 0.95
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.1

    @classmethod
    def variant(cls, settings: Any, *, component: str, matrix: bool) -> type[Rule]:
        return MuonRule if matrix and component in ("attention", "ffn", "other") else MuonAdamWRule

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr, "decay": self.lr * self.weight_decay, "rate": 1 - self.momentum}

    @staticmethod
    def direction(theta: Tensor, g: Tensor, m: Tensor, **s: Tensor) -> Tensor:
        m = m + s["rate"] * (g - m)
        return m + s["rate"] * (g - m)

    @staticmethod
    def transform(matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        x = matrix.T if rows > columns else matrix
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return max(1.0, rows / columns) ** 0.5 * (x.T if rows > columns else x)

    @staticmethod
    def update(theta: Tensor, g: Tensor, m: Tensor, *, o: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return theta - (s["decay"] * theta + s["lr"] * o), m + s["rate"] * (g - m)


class MuonAdamWRule(MuonRule):
    """AdamW, at the same rate."""

    states = (State("m"), State("v", signed=False))
    statistics = ()

    def scalars(self, t: int) -> dict[str, float]:
        b1, b2 = self.betas
        shares = {"m_share": 1 / (1 - b1**t), "v_share": 1 / (1 - b2**t), "rate1": 1 - b1, "rate2": 1 - b2}
        return {"lr": self.lr, "decay": self.lr * self.weight_decay, "eps": self.eps} | shares

    @staticmethod
    def update(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        m, v = m + s["rate1"] * (g - m), v + s["rate2"] * (g * g - v)
        step = s["m_share"] * m / ((s["v_share"] * v).sqrt() + s["eps"])
        return theta - (s["decay"] * theta + s["lr"] * step), m, v


Muon = as_optimizer(MuonRule)
