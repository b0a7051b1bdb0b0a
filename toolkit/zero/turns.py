"""One order of gradients on all ranks, for ZeRO stages 1 and 2.

Gradients are added up over ranks in buckets, which DeepSpeed fills in the order in which autograd makes gradients, on
each rank for itself. That adds up gradients of different parameters wherever forward passes differ by rank: a router
sends the tokens of rank 0 to one expert and those of rank 1 to another.

Here every rank passes gradients on in one order, with zeros for a parameter that has none. It is the order in which
they came on the first rank in the first backward pass; that rank announces it then, one small broadcast for each
parameter. Where all ranks run the same modules, no gradient ever waits; and none waits for one that autograd says will
not come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.autograd.graph import _get_grad_fn_or_grad_acc

from toolkit.errors import UserError
from toolkit.optim.streaming import check_gradient
from toolkit.zero.shards import members

_OVER = -1
"""Announced after the last parameter of the first backward pass."""


class Turns:
    """Calls `take` with parameters in one order on all ranks, whatever order their gradients come in.

    Args:
        params: all that may get a gradient, in the same order on every rank.
        process_group: the ranks that must agree. Alone, a rank takes gradients as they come.
        take: called with a parameter when it is its turn; in each backward pass with every one, gradient or not.
        name: of a parameter, for what the user reads.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        process_group: Any,
        take: Callable[[Tensor], None],
        name: Callable[[Tensor], str],
    ) -> None:
        self._params, self._group, self._take, self._name = list(params), process_group, take, name
        self._number = {id(param): number for number, param in enumerate(self._params)}
        self._alone = dist.get_world_size(process_group) == 1
        self._leads = dist.get_rank(process_group) == 0
        self._order: list[int] = []  # a parameter with several gradients in a pass (reentrant checkpointing) repeats
        self._settled = False
        self._next = 0
        self._here: set[int] = set()
        self._came: set[int] = set()
        self._coming: set[int] | None = None  # in this pass, as autograd says
        self._foretold = False  # whether that was right in the first pass: not so with reentrant checkpointing

    def arrive(self, param: Tensor) -> None:
        """The gradient of `param` is there; take what has its turn now."""
        if self._alone:
            self._take(param)
            return
        number = self._number[id(param)]
        self._here.add(number)
        if not self._settled:
            self._came.add(number)
            self._ask()
        self._advance(end=False)

    @property
    def open(self) -> bool:
        """Whether gradients have come since the last `end`."""
        return bool(self._here) or self._next > 0

    def end(self) -> None:
        """The backward pass is over: take all that is left."""
        if self._alone:
            return
        self._advance(end=True)
        if self._came:
            self._foretold, self._came = self._came == self._coming, set()
        self._next, self._coming = 0, None

    def _advance(self, *, end: bool) -> None:
        while end or self._here:
            if self._next == len(self._order) and not self._settled:
                number = self._announce(end) if self._leads else self._hear()
                if number == _OVER:
                    self._settled = True
                else:
                    self._order.append(number)
            if self._next == len(self._order):
                self._refuse_more()
                return
            number = self._order[self._next]
            if number not in self._here and not end and self._may_come(number):
                return
            self._here.discard(number)
            self._next += 1
            self._take(self._params[number])

    def _may_come(self, number: int) -> bool:
        if not self._foretold:
            return True
        self._ask()
        return self._coming is None or number in self._coming

    def _ask(self) -> None:
        """Find out, once a pass, which gradients the running backward pass will make."""
        if self._coming is None and torch._C._current_graph_task_id() != -1:
            with torch.enable_grad():
                nodes = [_get_grad_fn_or_grad_acc(param) if param.requires_grad else None for param in self._params]
            self._coming = {
                number
                for number, node in enumerate(nodes)
                if node is not None and torch._C._will_engine_execute_node(node)
            }

    def _announce(self, end: bool) -> int:
        number = next(iter(self._here), _OVER)
        if number == _OVER:
            assert end
            told = set(self._order)
            number = next((left for left in range(len(self._params)) if left not in told), _OVER)
        self._broadcast(number)
        return number

    def _hear(self) -> int:
        return self._broadcast(_OVER)

    def _broadcast(self, number: int) -> int:
        told = torch.tensor([number], device=get_accelerator().current_device_name())
        dist.broadcast(told, dist.get_global_rank(self._group, 0), group=self._group)
        return number if self._leads else int(told.tolist()[0])

    def _refuse_more(self) -> None:
        if self._here:
            again = ", ".join(self._name(self._params[number]) for number in sorted(self._here))
            raise UserError(
                f"{again}: more gradients in one backward pass than in the first one of this run; ZeRO stages 1 and 2 "
                "add up gradients over ranks and need the same number each time (use activation checkpointing with "
                "use_reentrant=False)"
            )


class OrderedZeroOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's optimizer of stages 1 and 2, with gradients in one order on all ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Without elements there is nothing to reduce, and no hook comes this far.
        placed = [member for _, member in members(self) if member.shape.numel()]
        group_of = {id(member.param): member.group for member in placed}
        self._turns = Turns(
            [member.param for member in placed],
            self.dp_process_group,
            lambda param: self._take(param, group_of[id(param)]),
            self._name,
        )

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Tensor, i: int) -> None:
        """Called for each gradient that is ready to be reduced."""
        if param.numel() and getattr(param, "ds_grad_is_ready", True):
            if param.grad is not None:
                check_gradient(param.grad, self._name(param))
            self._turns.arrive(param)

    def _name(self, param: Tensor) -> str:
        return repr(self.param_names.get(param, "a parameter"))

    def _take(self, param: Any, i: int) -> None:
        if self.get_gradient_for_reduction(param) is None:
            self.setup_buckets()  # for a rank that has no gradient at all
            if self.use_grad_accum_attribute:
                param.grad_accum = torch.zeros_like(param, dtype=self.gradient_accumulation_dtype)
            else:
                param.grad = torch.zeros_like(param)
        super().reduce_independent_p_g_buckets_and_remove_grads(param, i)

    def independent_gradient_partition_epilogue(self) -> None:
        """Called at the end of a backward pass."""
        self._turns.end()
        super().independent_gradient_partition_epilogue()
