"""Rules that look at more than one element: their parameters in a step, and the collectives for sums and matrices.

The norm of all gradients is summed over ranks by the same `DataParallel.add` as means are, but it is no
`Mean(over="model")`: measuring functions are given gradients that are already multiplied by the clip factor, which
contains it, and whether there is a step at all follows from it. So it has to be there, on the host where steps may be
skipped, before a step is counted and the first pass runs. It is taken over gradients as they lie, which needs neither
state nor a compiled kernel, also for rules without statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim import RuleOptimizer
from toolkit.optim.statistics import Member, Parameter, Share, small_states
from toolkit.optim.streaming import TensorStep
from toolkit.state.sharding import Fragment
from toolkit.zero.lending import lend
from toolkit.zero.shards import Shard


class DataParallel:
    """The ranks that hold parts of the same parameters (`toolkit.optim.statistics.Ranks`).

    Tensors may lie on the host (offload); what goes over the wire lies where the backend wants it.
    """

    def __init__(self, process_group: Any) -> None:
        self._group = process_group
        self.size = int(dist.get_world_size(process_group))
        self.number = int(dist.get_rank(process_group))

    def add(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor
        total = tensor.to(get_accelerator().current_device_name())
        dist.all_reduce(total, group=self._group)
        return total.to(tensor.device)

    def swap(self, sent: Tensor, given: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        if self.size == 1:
            return lambda: sent
        device, wire = sent.device, get_accelerator().current_device_name()
        sent = sent.to(wire)
        arriving = sent.new_empty(sum(received))
        sizes = list(received), list(given)
        work = lend(
            lambda to, here: dist.all_to_all_single(to, here, *sizes, group=self._group, async_op=True), arriving, sent
        )

        def arrived() -> Tensor:
            work.wait()
            return arriving.to(device)

        return arrived


def whole_parameters(
    optimizer: RuleOptimizer, shard: Shard, begun: TensorStep, gradient: Callable[[Fragment], Tensor | None]
) -> list[Member]:
    """The parameters of a flat tensor in the step `begun`, and what this rank holds of them, without the padding.

    Args:
        gradient: of what this rank holds of a parameter; None: there is none.
    """
    found = []
    for member, (parameter, states) in zip(shard.members, with_small(optimizer, shard), strict=True):
        own = member.fragment
        part = gradient(own) if own is not None else None
        share = Share(own, part, member.first_block) if own is not None and part is not None else None
        found.append(Member(parameter, begun, states, member.fragments, share))
    return found


def with_small(optimizer: RuleOptimizer, shard: Shard) -> list[tuple[Parameter, dict[str, Tensor]]]:
    """The parameters of a flat tensor, each with the states that every rank holds whole; made where missing."""
    group = optimizer.param_groups[shard.group]
    parameters = [Parameter(tuple(member.shape), group["component"]) for member in shard.members]
    small = small_states(optimizer.whole(group), parameters, optimizer.state[shard.tensor], shard.tensor.device)
    return list(zip(parameters, small, strict=True))


def check_whole(optimizer: RuleOptimizer, *, split: bool) -> None:
    """Raise UserError for a rule that looks at whole parameters where `split` says that more than ZeRO cuts them."""
    if split and (found := optimizer.looks_at()):
        raise UserError(
            f"{type(optimizer).__name__} looks at whole parameters ({found}), which is supported neither "
            "with mixture-of-experts layers under expert parallelism nor with model parallelism nor MiCS"
        )
