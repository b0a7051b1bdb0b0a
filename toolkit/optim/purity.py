"""Whether a rule's functions are what the compiled step takes them for: elementwise and pure.

The step calls them on blocks, of several parameters or of a part of one, so what looks at other elements (`g.mean()`)
gives numbers that depend on how tensors happen to be cut. Two tiny tensors, alone and joined, show that in
milliseconds, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from toolkit.errors import UserError, nearest
from toolkit.optim.rule import NEEDS, Matrix, Mean, Rule
from toolkit.state.layout import elementwise

SHAPE = (2, 64)
TOLERANCE = 1e-5
"""Of the largest result: the same operation may round differently in a tensor of another shape."""

_checked: set[type[Rule]] = set()


def with_defaults(rule: type[Rule]) -> Rule | None:
    """The rule with its defaults, and a number for what the run fills in; None if that is not enough."""
    known = dict.fromkeys(rule.needs, 100)
    try:
        made = rule.model_validate(known)
        made.check_ready()
    except (ValidationError, UserError):
        return None
    return made


@torch.no_grad()
def check_pure(rule: Rule) -> None:
    """Raise UserError if a function of `rule` is not elementwise, or changes what it is given; once for each class."""
    kind = type(rule)
    if kind in _checked or kind.update is Rule.update or kind.scalars is Rule.scalars:  # abstract: nothing to try
        return
    # Models are also made on the meta device, and in modes in which tensors have no numbers.
    with _disable_current_modes(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scalars = {key: torch.tensor(value, dtype=torch.float32) for key, value in rule.scalars(1).items()}
        _check_names(kind, scalars)
        # What hyper-parameters and steps make small, or 0, would hide what other ones show: a small rate, a warm-up.
        drawn = {key: 0.1 + 0.8 * torch.rand(()) for key in scalars}
        # Of very different size, so that whatever is summed over both is far from what is summed over one.
        matrix = kind.matrix()
        results = {by: len(means) for by, means in kind.passes().items()} | ({matrix.by: 1} if matrix else {})
        results["update"] = 1 + len(elementwise(kind.states))
        for name, count in results.items():
            numbers, wide = kind.given(name)
            tensors = [_draw(kind, len(wide), 1.0), _draw(kind, len(wide), 100.0)]
            for values in (scalars, drawn):
                _check(kind, name, tensors, values, numbers, wide, count)
    _checked.add(kind)


def check_declared(rule: type[Rule]) -> None:
    """Raise UserError, or ValueError, if what `rule` declares does not fit together."""
    anchors = {state.name for state in rule.states if state.residual_of is None}
    for state in rule.states:
        if state.residual_of is not None and state.residual_of not in anchors:
            raise ValueError(
                f"{rule.__name__}: state {state.name!r} is a residual of {state.residual_of!r}, which must be a state "
                "of the rule that is itself a residual of none"
            )
    for need in rule.needs:
        if need not in NEEDS:
            hint = nearest(need, NEEDS)
            raise UserError(
                f"{rule.__name__}: needs names {need!r}, which no run knows; known is {', '.join(NEEDS)}.{hint}"
            )
        if need not in rule.model_fields:
            raise UserError(f"{rule.__name__}: needs names {need!r}, for which the rule must have a field.")
    names = [state.name for state in rule.states] + [one.name for one in rule.statistics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{rule.__name__}: {twice!r} names two of its states and statistics")
    if sum(isinstance(one, Matrix) for one in rule.statistics) > 1:
        raise UserError(f"{rule.__name__}: statistics has two matrices, but a rule can have one")
    for one in rule.statistics:
        for function in (one.by, *([one.transform] if isinstance(one, Matrix) else [])):
            if not callable(getattr(rule, function, None)):
                raise UserError(f"{rule.__name__}: {one.name!r} needs a function {function!r}, which it does not have")
        if one.by == "update" or (isinstance(one, Matrix) and one.by in rule.passes()):
            other = "updates" if one.by == "update" else "gives means"
            raise UserError(f"{rule.__name__}: {one.name!r} must have a function of its own, but {one.by!r} {other}")
        if isinstance(one, Mean) and one.over not in OVER:
            raise UserError(f"{rule.__name__}: {one.name!r} is over {one.over!r}, but must be over {_or(OVER)}")
    _check_after(rule)
    for state in rule.states:
        if state.of is not None and state.of not in OF:
            raise UserError(f"{rule.__name__}: state {state.name!r} is of {state.of!r}, but must be of {_or(OF)}")
        if state.of is not None and not rule.passes():
            raise UserError(f"{rule.__name__}: state {state.name!r} is of {state.of}, but there are no means to follow")
        if state.of is not None and rule.follow is Rule.follow:
            raise UserError(f"{rule.__name__}: state {state.name!r} is of {state.of}, which needs a function 'follow'")


def _check_after(rule: type[Rule]) -> None:
    """Raise UserError if what is measured after the matrix is over parameters that are never together."""
    matrix, (_, after) = rule.matrix(), rule.order()
    for mean in (mean for by in after for mean in rule.passes()[by]):
        if matrix is not None and mean.over not in AFTER:
            raise UserError(
                f"{rule.__name__}: {mean.name!r} is over {mean.over!r}, but must be over {_or(AFTER)}, since "
                f"{mean.by!r} runs after the matrix {matrix.name!r}, which is of a few parameters at a time"
            )


OVER = ("parameter", "row", "column", "component", "model")
AFTER = ("parameter", "row", "column")
OF = ("rows", "columns", "parameter")


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _check_names(rule: type[Rule], scalars: Mapping[str, Tensor]) -> None:
    """Raise UserError if a function would be given two things by one name."""
    names = [state.name for state in rule.states if state.of is not None] + [one.name for one in rule.statistics]
    twice = next((name for name in names if name in scalars), None)
    if twice is not None:
        raise UserError(f"{rule.__name__}: {twice!r} names one of its scalars and one of its states or statistics")


def _draw(rule: type[Rule], wide: int, size: float) -> list[Tensor]:
    """Weights, gradient and states, and what else there is for each element."""
    signed = [True, True, *(state.signed for state in elementwise(rule.states)), *[False] * wide]
    return [size * (torch.randn(SHAPE) if either else torch.rand(SHAPE)) for either in signed]


def _check(
    rule: type[Rule],
    name: str,
    tensors: Sequence[Sequence[Tensor]],
    scalars: Mapping[str, Tensor],
    numbers: Sequence[str],
    wide: Sequence[str],
    results: int,
) -> None:
    where, function = f"{rule.__name__}.{name}", getattr(rule, name)

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        named = {**scalars, **{number: torch.full((len(given[0]), 1), 0.5) for number in numbers}}
        before = [*given, *named.values()]
        copies = [x.clone() for x in before]
        plain = given[: len(given) - len(wide)]
        made = function(*plain, **named, **dict(zip(wide, given[len(plain) :], strict=True)))
        found = [made] if isinstance(made, Tensor) else list(made)
        if len(found) != results:
            raise UserError(f"{where} returns {len(found)} tensors, but must return {results}")
        if any(x.shape != given[0].shape for x in found):
            raise UserError(f"{where} returns a tensor of another shape than it was given, and must be elementwise")
        if not all(torch.equal(x, copied) for x, copied in zip(before, copies, strict=True)):
            raise UserError(f"{where} changes a tensor that it was given; it must return new ones")
        return [x.clone() for x in found]

    alone = [run(given) for given in tensors]
    for dim in (0, 1):
        together = run([torch.cat(pair, dim) for pair in zip(*tensors, strict=True)])
        for got, *parts in zip(together, *alone, strict=True):
            if not all(map(_close, got.tensor_split(len(parts), dim), parts)):
                raise UserError(
                    f"{where} is not elementwise: two tensors joined give other numbers than each of them alone; it "
                    "may not look at other elements (mean, sum, norm, sorting), shapes or random numbers"
                )


def _close(got: Tensor, want: Tensor) -> bool:
    finite = want[want.isfinite()].abs()
    most = float(finite.amax()) if finite.numel() else 0.0
    return torch.allclose(got, want, rtol=0.0, atol=TOLERANCE * most, equal_nan=True)
