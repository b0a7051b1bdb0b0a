"""What rules for hidden matrices share: AdamW for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from toolkit.errors import UserError
from toolkit.optim import adam
from toolkit.optim.rule import Beta, Matrix, Mean, NonNegative, Rule, SecondBeta, State

HIDDEN = ("attention", "ffn", "other")
"""Components whose matrices are hidden: neither embedding nor head."""


class HiddenMatrixRule(Rule):
    """Fields of AdamW, which trains what is no hidden matrix."""

    adamw_lr: NonNegative | None = None
    adamw_betas: tuple[Beta, SecondBeta] = (0.9, 0.95)
    adamw_eps: NonNegative = 1e-8

    @classmethod
    def variant(cls, settings: Mapping[str, Any], *, component: str, matrix: bool) -> type[Rule]:
        return cls if matrix and component in HIDDEN else with_adamw(cls)

    def check_ready(self) -> None:
        if self.adamw_lr is not None and self.lr == 0:
            name = type(self).__name__.removesuffix("Rule")
            raise UserError(f"{name}: lr is 0, but adamw_lr needs a positive lr, to whose schedule it is tied")


class _AdamW:
    """The part of a variant that replaces the rule's own."""

    states: ClassVar[tuple[State, ...]] = adam.STATES
    statistics: ClassVar[tuple[Mean | Matrix, ...]] = ()
    update = staticmethod(adam.update)

    def for_component(self: Any, component: str) -> dict[str, Any]:
        return {"lr_scale": 1.0 if self.adamw_lr is None else self.adamw_lr / self.lr}

    def scalars(self: Any, t: int) -> dict[str, float]:
        return adam.scalars(t, lr=self.lr, weight_decay=self.weight_decay, betas=self.adamw_betas, eps=self.adamw_eps)


@cache
def with_adamw(rule: type[Rule]) -> type[Rule]:
    """The variant of `rule` that is AdamW with its `adamw_` fields."""
    return type(f"{rule.__name__.removesuffix('Rule')}AdamWRule", (_AdamW, rule), {"__module__": rule.__module__})
