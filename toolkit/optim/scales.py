"""gamma_c: the factor by component of a rule's rate; constant, moving over the training, or following what is measured.

A rule that has it is a `ScaledRule`; "dynamic" is its variant with `DynamicScales`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, WrapValidator
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.rule import Matrix, Mean, Rule, State, component_mapping
from toolkit.optim.schedules import Setting, check_setting, moves, value_at

DYNAMIC = "dynamic"


def _check_scale(value: Any) -> Setting:
    return check_setting(value, "a scale", most=math.inf)


def _check_scales(value: Any, check: Any) -> Any:
    if isinstance(value, str):
        if value != DYNAMIC:
            raise ValueError(f"must be {DYNAMIC!r} or an object of scales by component")
        return value
    return component_mapping(check(value))


Scales = Annotated[dict[str, Annotated[Setting, BeforeValidator(_check_scale)]] | None, WrapValidator(_check_scales)]
"""A scale, or how it moves, for some components; or DYNAMIC."""


class ScaledRule(Rule):
    """A rule whose rate, and weight decay with it, is multiplied by gamma_c.

    Subclasses have fields `component_scales: Scales = None` and `total_steps`, scalars `lr` and `decay`, and a
    `direction`, which is all of the update but the rate::

        theta <- theta - gamma_c eta (wd theta + direction)
    """

    default_scales: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """gamma of components that `component_scales` does not name; of those that neither names it is 1."""

    if TYPE_CHECKING:  # a field would come before those of the rule
        component_scales: Scales
        total_steps: int | None

    @classmethod
    def is_dynamic(cls, settings: Mapping[str, Any]) -> bool:
        """Whether these hyper-parameters have scales that follow what is measured."""
        return bool(settings.get("component_scales") == DYNAMIC)

    @property
    def scales(self) -> dict[str, Setting]:
        """gamma by component, of those that do not have 1."""
        if self.is_dynamic(dict(self)):
            return {}
        return {**self.default_scales, **(self.component_scales or {})}

    def for_component(self, component: str) -> dict[str, Any]:
        return {"lr_scale": self.scales.get(component, 1.0)}

    def check_ready(self) -> None:
        if self.total_steps is None and any(map(moves, self.scales.values())):
            rule = next(kind for kind in type(self).__mro__ if ScaledRule in kind.__bases__)  # and not a variant of it
            name = rule.__name__.removesuffix("Rule")
            raise UserError(
                f"{name}: total_steps is required because component_scales has scales that move over the training; "
                "give total_steps (toolkit.initialize fills it in from the run) or numbers"
            )

    @staticmethod
    def direction(g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        """The update without rate and weight decay, and the new states."""
        raise NotImplementedError

    @classmethod
    def update(cls, theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        step, *new = cls.direction(g, *states, **s)
        return theta - (s["decay"] * theta + s["lr"] * step), *new

    def report(self, t: int) -> dict[str, float]:
        moving = {component: one for component, one in self.scales.items() if moves(one)}
        return {f"scale_{component}": value_at(one, t, self.total_steps) for component, one in moving.items()}


# The part of a variant that replaces the rule's own; a model's fields would come before those of the rule.
if TYPE_CHECKING:
    _Part = ScaledRule
else:
    _Part = object


class DynamicScales(_Part):
    """gamma_c follows how large a component's updates are beside its weights.

    ::

        r_c  =  rms(direction) / rms(theta)          over the component; r is the same over the whole model
        l_c  <- b l_c + (1 - b) min(max(ln(r / r_c), -ln B), ln B)                        b = 0.98, B = 2
        gamma_c = exp(l_c)

    A component that moves faster than the model, relative to its size, is slowed, and a slower one sped up, by a factor
    of 2 at most. What gamma_c does to the weights comes back as r_c: the loop is closed. l_c is 0 at first, so gamma_c
    starts at 1, and stays as it is where a component has only zeros. r_c has no rate in it: schedules leave gamma_c
    alone.
    """

    LOG_SCALE: ClassVar[State] = State("log_scale", of="parameter")
    """l_c, the same for all parameters of the component."""

    statistics: ClassVar[tuple[Mean | Matrix, ...]] = (
        Mean("step2", over="component"),
        Mean("theta2", over="component"),
        Mean("model_step2", over="model"),
        Mean("model_theta2", over="model"),
    )
    SMOOTHING: ClassVar[float] = 0.98
    BOUND: ClassVar[float] = 2.0

    @classmethod
    def measure(cls, theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        step, *_ = cls.direction(g, *states, **s)
        step2, theta2 = step * step, theta * theta
        return step2, theta2, step2, theta2

    @classmethod
    def follow(
        cls, log_scale: Tensor, *, step2: Tensor, theta2: Tensor, model_step2: Tensor, model_theta2: Tensor, **s: Tensor
    ) -> tuple[Tensor, ...]:
        known = (step2 > 0) & (theta2 > 0)
        ratio = model_step2.log() - model_theta2.log() - step2.log() + theta2.log()
        bound = math.log(cls.BOUND)
        wanted = torch.where(known, (0.5 * ratio).clamp(-bound, bound), log_scale)
        return (log_scale + (1.0 - cls.SMOOTHING) * (wanted - log_scale),)

    @classmethod
    def update(cls, theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        scale = s["log_scale"].exp()
        return super().update(theta, g, *states, **(s | {"lr": s["lr"] * scale, "decay": s["decay"] * scale}))

    def report_found(self, t: int, component: str, **found: Tensor) -> dict[str, float]:
        return super().report_found(t, component, **found) | {f"scale_{component}": float(found["log_scale"].exp())}
