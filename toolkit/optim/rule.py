"""What an update rule is: hyper-parameters, the states it keeps, and pure functions on fp32 tensors.

A rule knows nothing of bits, devices, shards or checkpoints. `toolkit.optim.optimizer` runs any rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from toolkit.errors import UserError, nearest
from toolkit.sentences import explain
from toolkit.state.layout import State
from toolkit.state.sharding import lines

COMPONENTS = ("attention", "ffn", "embedding", "norm", "head", "other")
"""The parts of a transformer that a rule may treat differently."""

NEEDS = ("total_steps",)
"""What a run knows, and a rule may name in `needs`: the optimizer steps that the whole run takes."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, strict=True)]
SecondBeta = Annotated[float, Field(ge=0.001, lt=1, allow_inf_nan=False, strict=True)]
"""Of a second moment. With 0, v + (1 - b) (g^2 - v) is 0 in fp32 where g^2 is far below v, and the update huge."""


@dataclass(frozen=True)
class Mean:
    """A mean over more than one element of what a rule measures elementwise, the same whatever ranks hold of it.

    `over` says what it is one number of: a whole parameter, a row or a column of it, all parameters of a component, or
    the model. `by` names the rule's function whose result is averaged; those of one function are its results in order,
    measured in one pass over the tensors. Passes come in the order in which their functions first appear; from the
    first whose signature names the rule's `Matrix` on, they come after it has been transformed.
    """

    name: str
    over: Literal["parameter", "row", "column", "component", "model"]
    by: str = "measure"

    def sums(self, shape: Sequence[int]) -> int:
        """How many sums a parameter has: one, which those with the same owner add up later, or one for each row or
        column."""
        return lines(shape, self.over + "s") if self.over in ("row", "column") else 1


@dataclass(frozen=True)
class Matrix:
    """What a rule's function `by` gives elementwise, put together as a whole matrix on one rank, and there transformed.

    `transform` names the rule's function of that matrix, fp32 [rows, columns], to another one of its shape, whose
    elements `update` is given.
    """

    name: str
    by: str = "direction"
    transform: str = "transform"


class Rule(BaseModel):
    """Base class of all update rules: a frozen model whose fields are the hyper-parameters.

    A subclass declares `states`, its fields beside `lr`, and two methods:

    * `update(theta, g, *states, **scalars) -> (theta, *states)`: the mathematics, elementwise, fp32 in and out (`theta`
      and `g` are fp64 where weights are); finite elements of `g` beyond 2^63 are zeros, so its square is finite;
      `scalars` are the 0-d fp32 tensors that `scalars()` named;
    * `scalars(t)`: every number that `update` needs at step t = 1, 2, ..., computed here in Python's float64
      (bias corrections lose digits in fp32).

    What depends on more than one element is declared in `statistics` and handed to `update` by name, a single number as
    [blocks, 1] (docs/extending.md). Rows are along a parameter's first dimension, columns along all others together; a
    1-D parameter is one row; three dimensions are a stack of matrices. `State(name, of="rows")`, `"columns"` or
    `"parameter"` is kept by `follow`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    states: ClassVar[tuple[State, ...]]
    statistics: ClassVar[tuple[Mean | Matrix, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields that the run fills in where the user leaves them open, each one of NEEDS."""
    update_error: ClassVar[Mapping[str, float]] = {}
    """How far an update with coded state is from the exact one, in %, by state format; empty: not measured.

    The norm of the difference over the norm, all tensors: `python tests/benchmarks/codec_error.py --hidden 256`, whose
    table is in docs/state.md.
    """

    loss_price: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """By state format, with the weights that go with it, what it adds to the validation loss that fp32 state and master
    weights give, in nats, and twice the standard error; empty: not measured.

    Paired by seed: `python tests/benchmarks/quality.py`, whose table is in docs/benchmarks.
    """

    beside: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By state format, the hyper-parameters that it is made for: a plan sets them, and `loss_price` is measured so."""

    lr: NonNegative

    @staticmethod
    def update(theta: Tensor, g: Tensor, *states: Any, **scalars: Any) -> tuple[Tensor, ...]:
        """One step for one tensor. Pure: no side effects, no dependence on shape or position."""
        raise NotImplementedError

    @staticmethod
    def follow(*states: Any, **scalars: Any) -> tuple[Tensor, ...]:
        """The new states of rows, columns and parameters, in order: [rows], [columns] or [1].

        Called once all means that the signature names have been found; if it names none, after the first pass.
        """
        raise NotImplementedError

    def scalars(self, t: int) -> dict[str, float]:
        """The scalars of `update` at optimizer step `t` (from 1), the same names at every step."""
        raise NotImplementedError

    @classmethod
    def passes(cls) -> dict[str, tuple[Mean, ...]]:
        """The means by the function that measures them, in the order in which the functions run."""
        means = [one for one in cls.statistics if isinstance(one, Mean)]
        return {by: tuple(one for one in means if one.by == by) for by in dict.fromkeys(one.by for one in means)}

    @classmethod
    def matrix(cls) -> Matrix | None:
        """What this rule transforms as a whole, if anything."""
        return next((one for one in cls.statistics if isinstance(one, Matrix)), None)

    @classmethod
    def order(cls) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The measuring functions that run before the matrix is transformed, and those that run after."""
        functions, matrix = tuple(cls.passes()), cls.matrix()
        naming = (i for i, by in enumerate(functions) if matrix is not None and matrix.name in cls._named(by))
        first = next(naming, len(functions))
        return functions[:first], functions[first:]

    @classmethod
    def last_followed(cls) -> str | None:
        """The measuring function after whose pass the small states follow; None: there are no passes."""
        functions, named = tuple(cls.passes()), cls._named("follow")
        found = [by for by, means in cls.passes().items() if any(one.name in named for one in means)]
        return next(iter(found[-1:] or functions), None)

    @classmethod
    def given(cls, function: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What `function` is given by name beside scalars: single numbers, and what has a value for each element.

        A function is given what has been found before it runs. What has a value for each element is made for those
        functions only that name it in their signature.
        """
        passes, matrix, (before, after) = cls.passes(), cls.matrix(), cls.order()
        if function in passes:
            earlier = tuple(passes)[: tuple(passes).index(function)]
        else:
            earlier = before if matrix is not None and function == matrix.by else before + after
        means = [one for by in earlier for one in passes[by]]
        small = [state for state in cls.states if state.of is not None and cls.last_followed() in earlier]
        numbers = [one.name for one in means if one.over not in ("row", "column")]
        numbers += [state.name for state in small if state.of == "parameter"]
        wide = [one.name for one in means if one.over in ("row", "column")]
        wide += [state.name for state in small if state.of != "parameter"]
        wide += [matrix.name] if matrix is not None and function in (*after, "update") else []
        named = cls._named(function)
        return tuple(numbers), tuple(name for name in wide if name in named)

    @classmethod
    def _named(cls, function: str) -> tuple[str, ...]:
        return tuple(inspect.signature(getattr(cls, function)).parameters)

    @classmethod
    def variant(cls, settings: Mapping[str, Any], *, component: str, matrix: bool) -> type[Rule]:
        """The rule that runs in a parameter group: this one, or a subclass with the same fields.

        For modes that keep other states, and for rules that do something else with some parameters. `settings` are the
        group's hyper-parameters; `matrix` says whether its tensors have two dimensions or more and are no biases.
        """
        return cls

    @classmethod
    def variants(cls, settings: Mapping[str, Any]) -> tuple[type[Rule], ...]:
        """Every rule that runs in some parameter group with these hyper-parameters."""
        kinds = ((component, matrix) for matrix in (True, False) for component in COMPONENTS)
        found = (cls.variant(settings, component=component, matrix=matrix) for component, matrix in kinds)
        return tuple(dict.fromkeys(found))

    @classmethod
    def supply(cls, params: Mapping[str, Any], **known: Any) -> dict[str, Any]:
        """`params` with each of `needs` that they leave open as the run has it; None: the run does not know it."""
        found = {name: known[name] for name in cls.needs if params.get(name) is None and known.get(name) is not None}
        return {**params, **found}

    def for_component(self, component: str) -> dict[str, Any]:
        """Hyper-parameters that differ for `component`; `lr_scale` multiplies whatever lr a scheduler sets.

        It is a number or what else `schedules.check_setting` returns; one that moves needs a field `total_steps`.
        """
        return {}

    def check_ready(self) -> None:
        """Raise UserError if something that the run must supply (a number of steps, say) is still missing."""

    def report(self, t: int) -> dict[str, float]:
        """Values worth logging at step `t`."""
        return {}

    def report_found(self, t: int, component: str, **found: Tensor) -> dict[str, float]:
        """Values worth logging of what step `t` found for a component: means and states that are one number, 0-d."""
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


def all_states(rules: Iterable[type[Rule]]) -> tuple[State, ...]:
    """The states of several variants of a rule, each once.

    Raises UserError where one name stands for states of two kinds: files and formats go by names.
    """
    found: dict[str, State] = {}
    for rule in rules:
        for state in rule.states:
            if found.setdefault(state.name, state) != state:
                raise UserError(f"{rule.__name__}: state {state.name!r} is another one in another variant of the rule")
    return tuple(found.values())


def looks_at(rules: Iterable[type[Rule]]) -> str:
    """What rules look at beside single elements, for sentences; empty if at nothing else."""
    return ", ".join(dict.fromkeys(one.name for rule in rules for one in rule.statistics))


def waits_for(rules: Iterable[type[Rule]]) -> str:
    """The means of rules over more than one parameter, for sentences; empty if there are none."""
    means = (one for rule in rules for one in rule.statistics if isinstance(one, Mean))
    return ", ".join(dict.fromkeys(one.name for one in means if one.over in ("component", "model")))


def component_mapping(value: Mapping[str, float] | None) -> dict[str, float]:
    """A mapping by component as a dict, None as an empty one; raises UserError on an unknown component."""
    for name in value or {}:
        check_component(name)
    return dict(value or {})
