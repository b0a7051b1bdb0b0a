"""QHAdam (Ma and Yarats 2019), a rule with two states."""

from torch import Tensor

from toolkit.optim import Beta, NonNegative, Rule, State, as_optimizer


class QHAdamRule(Rule):
    """Adam whose numerator and denominator are means of a momentum and of the gradient itself.

    theta <- theta - lr ((1 - n1) g + n1 m) / (sqrt((1 - n2) g^2 + n2 v) + eps), m and v corrected for their start.
    """

    states = (State("m"), State("v", signed=False))

    lr: NonNegative = 1e-3
    betas: tuple[Beta, Beta] = (0.995, 0.999)
    nus: tuple[NonNegative, NonNegative] = (0.7, 1.0)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0

    def scalars(self, t: int) -> dict[str, float]:
        (b1, b2), (n1, n2) = self.betas, self.nus
        return {
            "lr": self.lr,
            "decay": self.lr * self.weight_decay,
            "eps": self.eps,
            "rate1": 1 - b1,
            "rate2": 1 - b2,
            "g_share": 1 - n1,
            "m_share": n1 / (1 - b1**t),
            "g2_share": 1 - n2,
            "v_share": n2 / (1 - b2**t),
        }

    @staticmethod
    def update(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        m = m + s["rate1"] * (g - m)
        v = v + s["rate2"] * (g * g - v)
        size = (s["g2_share"] * g * g + s["v_share"] * v).sqrt() + s["eps"]
        step = (s["g_share"] * g + s["m_share"] * m) / size
        return theta - (s["decay"] * theta + s["lr"] * step), m, v


QHAdam = as_optimizer(QHAdamRule)
