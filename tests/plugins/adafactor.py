"""Adafactor (Shazeer and Stern 2018), a rule with means over rows and columns, and states of them."""

from torch import Tensor

from toolkit.optim import Mean, NonNegative, Rule, State, as_optimizer


class AdafactorRule(Rule):
    """Adafactor without momentum: v is the product of a mean over rows and one over columns; a vector is one row.

    r, c  <- averages of g^2 + eps1 over rows and over columns, with 1 - t^-decay for their beta
    u     =  g / sqrt(r c / mean(r))
    theta <- theta - lr wd theta - max(eps2, rms(theta)) min(lr, t^-1/2) u / max(1, rms(u) / clip)
    """

    states = (State("r", of="rows"), State("c", of="columns"))
    statistics = (
        Mean("row", over="row"),
        Mean("column", over="column"),
        Mean("theta2", over="parameter"),
        Mean("ratio2", over="parameter", by="measure_step"),
        Mean("mean_r", over="parameter", by="measure_step"),
    )

    lr: NonNegative = 1e-2
    decay: NonNegative = 0.8
    eps: tuple[NonNegative, NonNegative] = (1e-30, 1e-3)
    clip: NonNegative = 1.0
    weight_decay: NonNegative = 0.0

    def scalars(self, t: int) -> dict[str, float]:
        return {
            "rate": min(self.lr, t**-0.5),
            "decay": self.lr * self.weight_decay,
            "rate2": t**-self.decay,
            "eps1": self.eps[0],
            "eps2": self.eps[1],
            "clip": self.clip,
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
        rate = s["rate"] * s["theta2"].sqrt().maximum(s["eps2"]) / (rms / s["clip"]).clamp(min=1.0)
        return (theta - (s["decay"] * theta + rate * u),)


Adafactor = as_optimizer(AdafactorRule)
