"""The collectives of rules that look at more than one element: sums of their means, and parts of whole matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim import RuleOptimizer
from toolkit.optim.rule import looks_at


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
        work = dist.all_to_all_single(arriving, sent, list(received), list(given), group=self._group, async_op=True)

        def arrived() -> Tensor:
            work.wait()
            return arriving.to(device)

        return arrived


def check_whole(optimizer: RuleOptimizer, *, split: bool) -> None:
    """Raise UserError for a rule that looks at whole parameters where `split` says that more than ZeRO cuts them."""
    if split and (found := looks_at(optimizer.rules())):
        raise UserError(
            f"{type(optimizer).__name__} looks at whole parameters ({found}), which is supported neither "
            "with mixture-of-experts layers under expert parallelism nor with model parallelism nor MiCS"
        )
