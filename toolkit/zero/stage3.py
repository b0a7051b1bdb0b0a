"""ZeRO stage 3 without a second copy of weights and without transients in the step.

DeepSpeed 0.19.8 (stage3.py) means to let the optimizer work on this rank's shards of the model where both have one
dtype, and compares a device with its name, so that it never does. Here it is given the device. Its step flattens and
casts the gradients of one sub-group after the other; they lie in one flat buffer in just that order, so here they are
used where they are.

Three streams of the device touch the same memory: the current one computes and steps, a second gathers weights ahead of
their use, a third reduces gradients. DeepSpeed orders them by making the host wait for the device, after each backward
pass and, by accident, in the step. Here the streams wait for each other, and the host only where it needs a number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.torch_autocast import sort_dtypes
from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import OPTIMIZER_STEP_TIMER, DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.optim import RuleOptimizer
from toolkit.optim.scalars import Known
from toolkit.optim.statistics import Member
from toolkit.optim.streaming import TensorStep, check_gradient
from toolkit.optim.together import step_together
from toolkit.printable import warn_once
from toolkit.state.codecs import BLOCK
from toolkit.zero.access import NO_GRADIENTS, Access
from toolkit.zero.agreement import Order, have_nothing
from toolkit.zero.exchange import DataParallel, check_whole, whole_parameters
from toolkit.zero.gradients import HostCopy, clip_scale, squared_norm, takes_mean
from toolkit.zero.master import MasterWeights
from toolkit.zero.shards import Shard, model_weights, part_masters, shards, uncloned

logger = logging.getLogger("toolkit")


class ShardedZeroOptimizer3(Access, MasterWeights, DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's stage 3 optimizer around a `RuleOptimizer`."""

    offload_optimizer: bool
    offload_optimizer_pin_memory: bool
    device: Any
    micro_step_id: int

    def __init__(self, module: nn.Module, init_optimizer: RuleOptimizer, *args: Any, **kwargs: Any) -> None:
        self._order = Order()
        self._scalars: Known = {}  # of the step that has begun
        self._came: set[int] = set()  # parameters whose gradients came in the backward pass that is under way
        if takes_mean(kwargs):
            warn_once(
                logger,
                "prescale_gradients and gradient_predivide_factor have no effect for %s: gradients are divided by the "
                "number of ranks while they are added up",
                type(init_optimizer).__name__,
            )
        super().__init__(module, init_optimizer, *args, **kwargs)
        cut_over = {id(one.process_group): one.process_group for shard in self._shards for one in shard.members}
        self._one_group = self.model_parallel_group is None and len(cut_over) == 1
        self._ranks = DataParallel(self.dp_process_group)
        sizes = {self._ranks.size, *(int(dist.get_world_size(group)) for group in cut_over.values())}
        check_whole(init_optimizer, split=not self._one_group or len(sizes) > 1)
        self._gathers = self.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
        if not get_accelerator().is_synchronized_device():
            stream = self._gathers  # and not `self`, which the model would keep alive
            # Whatever has written shards, a step or a user, has done so on the current stream.
            module.register_forward_pre_hook(
                lambda *_: stream.wait_stream(get_accelerator().current_stream()), prepend=True
            )

    def _create_fp32_partitions(self) -> None:
        name = self.device
        if self.holds_weights:
            # DeepSpeed compares it with tensors' devices, and a name is none: it would copy all weights first.
            self.device = torch.device(name)
        with uncloned(self) if self.offload_optimizer else nullcontext():
            super()._create_fp32_partitions()
        self.device = name
        part_masters(self)
        self._shards = shards(self)
        if self.holds_weights:
            for shard in self._shards:
                own = model_weights(self, shard)
                if own is not None and own.device == shard.tensor.device:
                    shard.tensor.data = own.data

    def initialize_optimizer_states(self) -> None:
        """State is allocated at the first step, and gradients need no buffer beside `grad_partitions_flat_buffer`."""

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any) -> None:
        """Called for each gradient that is ready to be reduced."""
        name = repr(self.param_names.get(param, "a parameter"))
        again = param.ds_id in self._came
        self._came.add(param.ds_id)
        if again and any(one is param for bucket in self.ipg_buckets.values() for one in bucket.params):
            raise UserError(
                f"{name}: its gradient comes in parts, as reentrant activation checkpointing brings that of tied "
                "weights, and stage 3 cannot add them up; use use_reentrant=False, or stage 1 or 2"
            )
        check_gradient(param.grad, name)
        self._order.note(param.ds_id)
        super().reduce_independent_p_g_buckets_and_remove_grads(param)

    def partition_grads(self, params_to_release: list[Any], grad_partitions: list[Tensor]) -> None:
        """Called for each bucket: a step's first gradient of a parameter replaces what is there, the next are added.

        DeepSpeed decides that by the number of forward passes, for all parameters alike: a layer that was skipped in
        the first micro-batch would add to an earlier step's gradient, a second backward pass would replace the first.
        """
        both = list(zip(params_to_release, grad_partitions, strict=True))
        added = [param.ds_id in self._offload_boundary_param_ids for param in params_to_release]
        kept = self.micro_step_id
        for self.micro_step_id in (0, 1):
            some = [one for one, adds in zip(both, added, strict=True) if adds == self.micro_step_id]
            super().partition_grads([param for param, _ in some], [gradient for _, gradient in some])
        self.micro_step_id = kept

    @property
    def is_open(self) -> bool:
        return any(bucket.params for bucket in self.ipg_buckets.values())

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.is_open:  # as at stages 1 and 2
            self.independent_gradient_partition_epilogue()
        super().zero_grad(set_to_none)
        self._offload_boundary_param_ids.clear()

    def _offload_grad_partition_at_boundary(self, *args: Any) -> None:
        """The gradient is on the host already."""

    def independent_gradient_partition_epilogue(self) -> None:
        """The end of a backward pass: reduce what waits, and let what follows wait for the reductions."""
        for dtype in sort_dtypes(self.ipg_buckets.keys()):
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
        wait_for(self.reduce_and_partition_stream)
        if self.offload_optimizer:
            _host_waits()  # gradients are on their way to the host, which reads them next
        for param_id in self.params_already_reduced:
            self.params_already_reduced[param_id] = False
        self._came.clear()
        self._epilogue_ran_this_backward = True

    def _get_fp32_grad_state_partition(self, param: Any, release_swap_buffers: bool) -> tuple[Tensor, int]:
        return self._gradient_of(param), self.grad_position[self.get_param_id(param)][0]

    def _this_steps(self, param: Any) -> Tensor:
        """This rank's part of the gradient that the next step has of `param`: zeros where it has none."""
        gradient = self._gradient_of(param)
        if not self._offload_boundary_param_ids:
            raise UserError(NO_GRADIENTS)
        if param.ds_id not in self._offload_boundary_param_ids:
            gradient.zero_()  # an earlier step's
            self._offload_boundary_param_ids.add(param.ds_id)
        return gradient

    def get_fp32_grad_partitions(self) -> dict[int, dict[int, Tensor]]:
        return {
            shard.number: {i: self._gradient_of(member.param).float() for i, member in enumerate(shard.members)}
            for shard in self._shards
        }

    def _gradient_of(self, param: Any) -> Tensor:
        gradients: dict[int, Tensor] = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        return gradients[param.ds_id]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Norm, clipping, update of this rank's shards. A step with gradients that are not finite is skipped."""
        wait_for(self._gathers)  # which reads shards that the step writes
        reduced = set(self._offload_boundary_param_ids)
        self._pre_step()
        self._partition_all_parameters()
        for shard in self._shards:
            for member in shard.members:
                if member.param.ds_id not in reduced:  # no part in this step; what is there is an earlier step's
                    self._gradient_of(member.param).zero_()
        both = HostCopy(self._scaled_norm_and_order()).wait()
        self._order.check(both.tolist()[1], self._ranks.size)
        known = both[0].float()
        scale_before = self.loss_scale
        self.overflow = is_invalid_grad_norm(known)
        if self._loss_scale_update_and_overflow_cleanup():
            return
        self._global_grad_norm = known / scale_before
        self.timers(OPTIMIZER_STEP_TIMER).start()
        self.zero_grad(set_to_none=True)
        scale = clip_scale(known, self.clip_grad, scale_before)
        scale = scale.to(self._shards[0].tensor.device, non_blocking=True)
        self._step_sub_groups(self._shards, scale)
        self._scalars = {}
        self.timers(OPTIMIZER_STEP_TIMER).stop()
        self.invalidate_secondary_tensor()
        self._gather_persistent()
        self.timers.log({OPTIMIZER_STEP_TIMER})

    def _gather_persistent(self) -> None:
        """Gather the parameters that stay whole between steps.

        All at once: DeepSpeed's `all_gather` takes a collective for each, and lets the host wait for the device.
        """
        have_nothing(self.persistent_parameters)
        absent = [param for param in self.persistent_parameters if param.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if absent:
            absent[0].all_gather_coalesced(absent).wait()

    def _scaled_norm_and_order(self) -> Tensor:
        """Global norm of the gradients as they are, and the sum over ranks of `_order`: fp64, [2]."""
        order = self._order.tensor(get_accelerator().current_device_name())
        if not self._one_group:
            self.averaged_gradients = {
                shard.number: [self._gradient_of(member.param) for member in shard.members] for shard in self._shards
            }
            offloaded, self.offload_optimizer = self.offload_optimizer, False
            norm = combine_grad_norm_groups(self._get_norm_groups())  # which knows what is counted how often
            self.offload_optimizer = offloaded
            return torch.stack([norm.double(), self._ranks.add(order)])
        square = squared_norm([self.grad_partitions_flat_buffer], order.device)
        square, order = self._ranks.add(torch.stack([square, order])).unbind()
        return torch.stack([square.sqrt(), order])

    def _step_sub_groups(self, placed: Sequence[Shard], scale: Tensor) -> None:
        """Step these flat tensors, whose gradients are in the buffer, in this order."""
        together: list[Member] = []
        waiting: list[Shard] = []
        gradients = self.grad_partitions_flat_buffer.split([shard.tensor.numel() for shard in placed])
        for shard, gradient in zip(placed, gradients, strict=True):
            own = self._step_sub_group(shard, gradient, scale)
            together += own
            waiting += [shard] if own else []
        self.optimizer.found = step_together(together, scale, self._ranks)
        for shard in waiting:
            self._show(shard)

    def _begin(self, shard: Shard) -> TensorStep | None:
        """Count a step of a sub-group and begin it; None while state is only allocated."""
        return self.optimizer.begin(self.optimizer.param_groups[shard.group], shard.tensor, self._scalars)

    def _step_sub_group(self, shard: Shard, gradient: Tensor, scale: Tensor) -> list[Member]:
        """Step a sub-group; what is to be stepped together with others comes back as it is."""
        begun = self._begin(shard)
        if begun is not None and self.optimizer.steps_together(self.optimizer.param_groups[shard.group]):
            return whole_parameters(self.optimizer, shard, begun, lambda own: gradient[own.elements])
        if begun is not None:
            rounds = begun.function.rounds
            # Members whose blocks are numbered in a row go through together: all, where numbers do not matter.
            for _, run in groupby(shard.members, lambda one: rounds and one.first_block - one.offset // BLOCK):
                first, *others = run
                last = others[-1] if others else first
                start, stop = first.offset, last.offset + last.share
                stream = begun.stream(start, stop, first_block=first.first_block)
                stream.add(gradient[start:stop], scale)
                stream.finish(scale)
        self._show(shard)
        return []

    def _show(self, shard: Shard) -> None:
        """Give the model the weights of a sub-group, unless they are the model's."""
        own = model_weights(self, shard)
        if own is None or own.data_ptr() != shard.tensor.data_ptr():  # None: the weights lie on NVMe
            self._reassign_or_swap_out_partitioned_parameters(shard.number)


def wait_for(stream: Any) -> None:
    """Let what is queued from now on begin after what `stream` has to do so far."""
    if not get_accelerator().is_synchronized_device():
        get_accelerator().current_stream().wait_stream(stream)


def _host_waits() -> None:
    if not get_accelerator().is_synchronized_device():
        get_accelerator().current_stream().synchronize()
