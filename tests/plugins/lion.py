"""A user's own rule, as docs/extending.md shows it: nothing but this file is needed."""

from torch import Tensor

from toolkit.optim import Beta, NonNegative, Rule, State, as_optimizer


class LionRule(Rule):
    """Lion: theta <- theta - lr (sign(b1 m + (1 - b1) g) + wd theta); m <- b2 m + (1 - b2) g."""

    states = (State("m"),)

    lr: NonNegative = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: NonNegative = 0.0

    def scalars(self, t: int) -> dict[str, float]:
        b1, b2 = self.betas
        return {"lr": self.lr, "decay": self.lr * self.weight_decay, "rate1": 1 - b1, "rate2": 1 - b2}

    @staticmethod
    def update(theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        (m,) = states
        direction = (m + s["rate1"] * (g - m)).sign()
        return theta - (s["decay"] * theta + s["lr"] * direction), m + s["rate2"] * (g - m)


Lion = as_optimizer(LionRule)
