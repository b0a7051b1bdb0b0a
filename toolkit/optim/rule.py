"""What an update rule is: hyper-parameters, the states it keeps, and one pure function on fp32 tensors.

A rule knows nothing of bits, devices, shards or checkpoints. `toolkit.optim.optimizer` runs any rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from toolkit.errors import UserError, nearest
from toolkit.sentences import explain
from toolkit.state.layout import State

COMPONENTS = ("attention", "ffn", "embedding", "norm", "head", "other")
"""The parts of a transformer that a rule may treat differently."""

NEEDS = ("total_steps",)
"""What a run knows, and a rule may name in `needs`: the optimizer steps that the whole run takes."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, strict=True)]


class Rule(BaseModel):
    """Base class of all update rules: a frozen model whose fields are the hyper-parameters.

    A subclass declares `states`, its fields beside `lr`, and two methods:

    * `update(theta, g, *states, **scalars) -> (theta, *states)`: the mathematics, elementwise, fp32 in and out (`theta`
      and `g` are fp64 where weights are); finite elements of `g` beyond 2^63 are zeros, so its square is finite;
      `scalars` are the 0-d fp32 tensors that `scalars()` named;
    * `scalars(t)`: every number that `update` needs at step t = 1, 2, ..., computed here in Python's float64
      (bias corrections lose digits in fp32).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    states: ClassVar[tuple[State, ...]]
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields that the run fills in where the user leaves them open, each one of NEEDS."""
    update_error: ClassVar[Mapping[str, float]] = {}
    """How far an update with coded state is from the exact one, in %, by state format; empty: not measured."""

    lr: NonNegative

    @staticmethod
    def update(theta: Tensor, g: Tensor, *states: Tensor, **scalars: Tensor) -> tuple[Tensor, ...]:
        """One step for one tensor. Pure: no side effects, no dependence on shape or position."""
        raise NotImplementedError

    def scalars(self, t: int) -> dict[str, float]:
        """The scalars of `update` at optimizer step `t` (from 1), the same names at every step."""
        raise NotImplementedError

    @classmethod
    def variant(cls, settings: Mapping[str, Any]) -> type[Rule]:
        """The rule that runs these hyper-parameters; a rule with modes that keep other states has a class for each."""
        return cls

    @classmethod
    def supply(cls, params: Mapping[str, Any], **known: Any) -> dict[str, Any]:
        """`params` with each of `needs` that they leave open as the run has it; None: the run does not know it."""
        found = {name: known[name] for name in cls.needs if params.get(name) is None and known.get(name) is not None}
        return {**params, **found}

    def for_component(self, component: str) -> dict[str, Any]:
        """Hyper-parameters that differ for `component`; `lr_scale` multiplies whatever lr a scheduler sets."""
        return {}

    def check_ready(self) -> None:
        """Raise UserError if something that the run must supply (a number of steps, say) is still missing."""

    def report(self, t: int) -> dict[str, float]:
        """Values worth logging at step `t`."""
        return {}

    @classmethod
    def parse(cls, settings: Mapping[str, Any], *, where: str) -> Rule:
        """Build the rule from plain values.

        Raises UserError with one sentence that names the key, its value and what is allowed.
        """
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise UserError(f"{where}: {explain(error, cls)}") from None


def check_component(name: str) -> None:
    """Raise UserError if `name` is not one of COMPONENTS."""
    if name not in COMPONENTS:
        hint = nearest(name, COMPONENTS)
        raise UserError(f"{name!r} is no component.{hint} Components are {', '.join(COMPONENTS)}")


def component_mapping(value: Mapping[str, float] | None) -> dict[str, float]:
    """A mapping by component as a dict, None as an empty one; raises UserError on an unknown component."""
    for name in value or {}:
        check_component(name)
    return dict(value or {})
