"""What rules say of a step, for a log: known at once, or found on the device and read when the device has made it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from toolkit.optim.rule import Rule
from toolkit.optim.together import Found

Told = Callable[[], dict[str, float]]
Copied = Callable[[Tensor], Callable[[], Tensor]]
"""Begins a tensor's copy to the host; what it returns waits for the copy and gives it."""


def told_later(
    groups: Sequence[tuple[type[Rule], str, Callable[[], Rule]]], found: Found, t: int, copied: Copied
) -> Told:
    """Values worth logging of step `t`, for when the device has made it; later steps change nothing of them.

    All that was found is one copy, whatever the number of rules and components.

    Args:
        groups: in order, the rule of each parameter group, its component, and what makes the rule as it is at step `t`.
    """
    told: dict[str, float] = {}
    for rule in {kind: rule for kind, _, rule in reversed(groups)}.values():
        told |= rule().report(t)
    firsts = {(kind, component): rule for kind, component, rule in reversed(groups)}
    asked = [
        (partial(firsts[kind, component]().report_found, t, component), numbers)
        for (kind, component), numbers in found.items()
        if groups and numbers and kind.report_found is not Rule.report_found
    ]
    if not asked:
        return lambda: told
    values = [value for _, numbers in asked for value in numbers.values()]
    wait = copied(torch.stack([value.to(values[0].device) for value in values]))
    names = [(of_component, tuple(numbers)) for of_component, numbers in asked]

    def read() -> dict[str, float]:
        numbers, all_told = iter(wait().unbind()), dict(told)
        for of_component, own in names:
            all_told |= of_component(**{name: next(numbers) for name in own})
        return all_told

    return read
