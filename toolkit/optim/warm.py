"""The compiled step before it is needed: a step of a small tensor of zeros that nobody keeps.

The first call of a step function compiles it, for up to half a minute, or loads what an earlier process left in the
compiler's cache on disk. Done here, no training step has that in its time.
"""

from __future__ import annotations

from typing import Any

import torch

from toolkit.optim.optimizer import RuleOptimizer
from toolkit.optim.statistics import Alone, Member, Parameter, Share, small_states
from toolkit.optim.together import step_together
from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import Fragment

BLOCKS = 1024
"""Blocks of the tensor of zeros. What the compiler decides by size (whether to use threads, how many blocks a program
on a GPU takes) it decides at the first call: the tensor is large enough for what large ones want."""


def kinds(optimizer: RuleOptimizer, weights: torch.dtype) -> list[dict[str, Any]]:
    """A parameter group for each function that steps tensors of dtype `weights` through the compiler."""
    compiled = (group for group in optimizer.param_groups if group["compile"])
    return list({(optimizer.rule_of(group), optimizer.layout(group, weights)): group for group in compiled}.values())


@torch.no_grad()
def warm(
    optimizer: RuleOptimizer,
    group: dict[str, Any],
    weights: torch.dtype,
    gradient: torch.dtype,
    device: torch.device | str,
) -> str | None:
    """Compile, or load, the function that steps tensors of `group`, for these dtypes of weights and gradients.

    Parameters, state and step counts stay as they are; 4 MB or less are held meanwhile.

    Returns:
        Why the step runs eagerly, or None where it is compiled.
    """
    tensor = torch.zeros(BLOCKS * BLOCK, dtype=weights, device=device)
    begun = optimizer.begin(group, tensor)
    del optimizer.state[tensor]
    assert begun is not None, "state is not only allocated here"
    scale = torch.ones((), device=device)
    zeros = torch.zeros_like(tensor, dtype=gradient)
    if optimizer.steps_together(group):
        whole = Parameter((BLOCKS, BLOCK), group["component"])
        small = small_states(optimizer.whole(group), [whole], {}, tensor.device)[0]
        everything = Fragment(0, 0, zeros.numel(), 0)
        step_together([Member(whole, begun, small, [everything], Share(everything, zeros, 0))], scale, Alone())
    else:
        stream = begun.stream(first_block=0)
        stream.add(zeros, scale)
        stream.finish(scale)
    return begun.function.fallback_reason
