"""A step of all parameters together, for a rule that looks at more than one element.

Means first, over everything that this rank holds; then the update of one parameter after the other, to which a mean
comes like any scalar, or of one round of matrices after the other. A rule without `statistics` has no part in this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.optim.matrices import step_matrices
from toolkit.optim.statistics import Member, Ranks, find_means


@torch.no_grad()
def step_together(members: Sequence[Member], scale: Tensor, ranks: Ranks) -> None:
    """Step `members`, on every rank the same ones in the same order.

    Gradients are multiplied by `scale`, and let go of as soon as they have been used.
    """
    if not members:
        return
    find_means(members, scale, ranks)
    if members[0].step.function.rule.matrix() is not None:
        step_matrices(members, scale, ranks)
        return
    for member in members:
        member.update(scale)
