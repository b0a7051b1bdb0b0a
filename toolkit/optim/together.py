"""A step of all parameters together, for rules that look at more than one element, and for factored states.

Means first, over everything that this rank holds; then the update, to which a mean comes like a scale: of one tensor
after the other, of one parameter where there are rows and columns, or of one round of matrices. Variants of a rule come
one after the other. What has no `statistics` and no factored state has no part in this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from toolkit.optim.aligned import aligned
from toolkit.optim.factored import settle
from toolkit.optim.matrices import step_matrices
from toolkit.optim.means import find_means
from toolkit.optim.rule import Rule
from toolkit.optim.statistics import Flat, Member, Ranks, by_block, flats

Found = Mapping[tuple[type[Rule], str], Mapping[str, Tensor]]
"""By rule and component, the single numbers that a step found, 0-d: of means over less, its last parameter's."""


@torch.no_grad()
def step_together(members: Sequence[Member], scale: Tensor, ranks: Ranks) -> Found:
    """Step `members`, on every rank the same ones in the same order.

    Gradients are multiplied by `scale`, and let go of as soon as they have been used.
    """
    numbers: dict[tuple[type[Rule], str], Mapping[str, Tensor]] = {}
    by_rule: dict[type[Rule], list[Member]] = {}
    for member in members:
        by_rule.setdefault(member.step.function.rule, []).append(member)
    for rule, each in by_rule.items():
        own, moved = aligned(each)
        before, _ = rule.order()
        find_means(own, before, scale, ranks)
        if rule.matrix() is not None:
            step_matrices(own, scale, ranks)
        else:
            parts: Sequence[Flat | Member] = flats(own) if by_block(own, "update") else own
            for part in parts:
                part.update(scale)
        for copied in moved:
            copied.write_back()
        numbers |= {(rule, member.parameter.component): member.numbers for member in own}
    settle([one for member in members for one in member.factors.values()], ranks)
    return numbers
