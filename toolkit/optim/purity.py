"""Whether a rule's functions are what the compiled step takes them for: elementwise and pure.

The step calls them on blocks, of several parameters or of a part of one, so what looks at other elements (`g.mean()`)
gives numbers that depend on how tensors happen to be cut. Two tiny tensors, alone and joined, show that in
milliseconds, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from toolkit.errors import UserError
from toolkit.optim.rule import Rule

SHAPE = (2, 64)
TOLERANCE = 1e-5
"""Of the largest result: the same operation may round differently in a tensor of another shape."""

_checked: set[type[Rule]] = set()


def with_defaults(rule: type[Rule]) -> Rule | None:
    """The rule with its defaults, and a number of steps where it takes one; None if that is not enough."""
    known = {"total_steps": 100} if "total_steps" in rule.model_fields else {}
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
    if kind in _checked:
        return
    # Models are also made on the meta device, and in modes in which tensors have no numbers.
    with _disable_current_modes(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scalars = {key: torch.tensor(value, dtype=torch.float32) for key, value in rule.scalars(1).items()}
        # Of very different size, so that whatever is summed over both is far from what is summed over one.
        tensors = [_draw(kind, 1.0), _draw(kind, 100.0)]
        _check(kind, "update", kind.update, tensors, scalars, 1 + len(kind.states))
    _checked.add(kind)


def _draw(rule: type[Rule], size: float) -> list[Tensor]:
    """Weights, gradient and states."""
    signed = [True, True, *(state.signed for state in rule.states)]
    return [size * (torch.randn(SHAPE) if either else torch.rand(SHAPE)) for either in signed]


def _check(
    rule: type[Rule],
    name: str,
    function: Callable[..., Any],
    tensors: Sequence[Sequence[Tensor]],
    named: Mapping[str, Tensor],
    results: int,
) -> None:
    where = f"{rule.__name__}.{name}"

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        before = [*given, *named.values()]
        copies = [x.clone() for x in before]
        made = function(*given, **named)
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
            want = torch.cat(parts, dim)
            if not torch.allclose(got, want, rtol=0.0, atol=TOLERANCE * float(want.abs().amax()), equal_nan=True):
                raise UserError(
                    f"{where} is not elementwise: two tensors joined give other numbers than each of them alone; it "
                    "may not look at other elements (mean, sum, norm, sorting), shapes or random numbers"
                )
