"""At ZeRO stage 3 all ranks must run the same modules in the same order.

Each rank holds a part of every weight; a module's weights are gathered when it runs, and its gradients added up when
they come, by collectives that take what every rank brings. A rank that runs another module brings another weight: with
equal shapes the ranks compute with a mixture of both, with different ones they wait for ever. No order can be made good
for that later, as it can be at stages 1 and 2 (`turns.py`), so a run stops with a sentence instead:

* while DeepSpeed records the order of modules (the first forward and backward pass), before each gather, by a small
  collective of its own;
* in every step of this package's optimizers, before weights change, by a number that goes along with the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from toolkit.errors import UserError

_MODULUS = 2**31 - 1  # sums over 4 million ranks are exact in fp64


class Order:
    """A number for the order in which things happened, the same on ranks on which it was the same."""

    def __init__(self) -> None:
        self._value = 1

    def note(self, number: int) -> None:
        """`number` came next."""
        self._value = (self._value * 48271 + number + 1) % _MODULUS

    def tensor(self, device: torch.device | str) -> Tensor:
        """What to add up over ranks: fp64, 0-d."""
        return torch.full((), float(self._value), dtype=torch.float64, device=device)

    def check(self, total: float, ranks: int) -> None:
        """Raise UserError unless `total`, the sum over `ranks`, says that all had one order; begins anew."""
        value, self._value = self._value, 1
        if total != float(value) * ranks:
            raise UserError(_sentence("made gradients of different parameters, or in another order, in this step"))


def _sentence(what: str) -> str:
    return (
        f"ranks {what}; at ZeRO stage 3 all must run the same modules in the same order: name the class of the module "
        "inside which they differ (a mixture of experts) in zero_optimization.leaf_module.classes, so that it is "
        "gathered as a whole, or use stage 1 or 2"
    )


def check_first_gathers() -> None:
    """Let every engine at stage 3 compare, over ranks, which module it gathers, until it knows the order of modules.

    Parameters without elements are there without a gather.
    """
    fetch: Callable[..., None] = PartitionedParameterCoordinator.fetch_sub_module

    def fetch_sub_module(self: Any, current_submodule: nn.Module, forward: bool) -> None:
        # Known on one rank, it is known on all: they found it out in the same pass.
        self.leanstate_order_known = getattr(self, "leanstate_order_known", False) or self.is_complete_trace()
        params = list(iter_params(current_submodule, recurse=z3_leaf_module(current_submodule)))
        absent = [param for param in params if param.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        have_nothing(absent)
        if absent and not self.leanstate_order_known:
            _compare(current_submodule, absent[0].ds_process_group)
        around = getattr(self, "leanstate_around_gathers", nullcontext)
        with around() if any(param.ds_status != ZeroParamStatus.AVAILABLE for param in params) else nullcontext():
            fetch(self, current_submodule, forward)

    PartitionedParameterCoordinator.fetch_sub_module = fetch_sub_module


def watch_gathers(engine: Any, around: Callable[[], AbstractContextManager[None]]) -> None:
    """Let `around` enclose, at stage 3, what makes a module's weights whole: its stream waits for all ranks there."""
    engine.optimizer.parameter_offload.get_param_coordinator().leanstate_around_gathers = around


def have_nothing(params: Iterable[Any]) -> None:
    """Let parameters without elements be there, which DeepSpeed cannot gather and then misses."""
    for param in params:
        if not param.ds_numel and param.ds_status == ZeroParamStatus.NOT_AVAILABLE:
            param.data = param.data.new_empty(param.ds_shape)
            param.ds_status = ZeroParamStatus.AVAILABLE


def _compare(module: Any, process_group: Any) -> None:
    ranks = dist.get_world_size(process_group)
    if ranks == 1:
        return
    total = torch.tensor([float(module.ds_id)], dtype=torch.float64, device=get_accelerator().current_device_name())
    dist.all_reduce(total, group=process_group)
    if total.item() != float(module.ds_id) * ranks:
        raise UserError(_sentence(f"run different modules at the same time, here {type(module).__name__}"))
