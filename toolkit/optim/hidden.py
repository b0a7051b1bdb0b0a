"""What rules for hidden matrices share: AdamW for everything else."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.rule import Beta, Matrix, Mean, NonNegative, Rule, State

HIDDEN = ("attention", "ffn", "other")
"""Components whose matrices are hidden: neither embedding nor head."""


class HiddenMatrixRule(Rule):
    """Fields of AdamW, for parameters that the rule itself is not for; `with_adamw` makes the variant that runs it."""

    adamw_lr: NonNegative | None = None
    adamw_betas: tuple[Beta, Beta] = (0.9, 0.95)
    adamw_eps: NonNegative = 1e-8

    def check_ready(self) -> None:
        if self.adamw_lr is not None and self.lr == 0:
            name = type(self).__name__.removesuffix("Rule")
            raise UserError(f"{name}: lr is 0, but adamw_lr needs a positive lr, to whose schedule it is tied")


class _AdamW:
    """The part of a variant that replaces the rule's own."""

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v", signed=False))
    statistics: ClassVar[tuple[Mean | Matrix, ...]] = ()

    def for_component(self: Any, component: str) -> dict[str, Any]:
        return {"lr_scale": 1.0 if self.adamw_lr is None else self.adamw_lr / self.lr}

    def scalars(self: Any, t: int) -> dict[str, float]:
        b1, b2 = self.adamw_betas
        return {
            "lr": self.lr,
            "decay": self.lr * self.weight_decay,
            "eps": self.adamw_eps,
            "m_rate": 1.0 - b1,
            "v_rate": 1.0 - b2,
            "m_correction": 1.0 / (1.0 - b1**t),
            "v_correction": (1.0 - b2**t) ** -0.5,
        }

    @staticmethod
    def update(theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        m, v = states
        m = m + s["m_rate"] * (g - m)
        v = v + s["v_rate"] * (g * g - v)
        step = s["m_correction"] * m / (v.sqrt() * s["v_correction"] + s["eps"])
        return theta - (s["decay"] * theta + s["lr"] * step), m, v


def with_adamw(rule: type[Rule]) -> type[Rule]:
    """The variant of `rule` that is AdamW with its `adamw_` fields."""
    return type(f"{rule.__name__.removesuffix('Rule')}AdamWRule", (_AdamW, rule), {"__module__": rule.__module__})


def is_hidden(component: str, matrix: bool) -> bool:
    return matrix and component in HIDDEN
