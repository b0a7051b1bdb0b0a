"""The collectives of rules that look at more than one element: sums of their means, and parts of whole matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim import RuleOptimizer


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

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        if self.size == 1:
            return list(parts)
        device = parts[0].device
        sent = torch.cat(list(parts)).to(get_accelerator().current_device_name())
        received = sent.new_empty(sum(sizes))
        given = [part.numel() for part in parts]
        dist.all_to_all_single(received, sent, list(sizes), given, group=self._group)
        return list(received.to(device).split(list(sizes)))


def check_whole(optimizer: RuleOptimizer, *, split: bool) -> None:
    """Raise UserError for a rule that looks at whole parameters where `split` says that more than ZeRO cuts them."""
    if split and names(optimizer):
        raise UserError(
            f"{type(optimizer).__name__} looks at whole parameters ({names(optimizer)}), which is supported neither "
            "with mixture-of-experts layers under expert parallelism nor with model parallelism nor MiCS"
        )


def names(optimizer: RuleOptimizer) -> str:
    """What the rules of its groups look at beside single elements, for sentences; empty if at nothing else."""
    return ", ".join(dict.fromkeys(one.name for rule in optimizer.rules() for one in rule.statistics))
