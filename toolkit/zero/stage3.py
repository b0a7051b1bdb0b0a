"""ZeRO stage 3 without a second copy of weights and without transients in the step.

DeepSpeed 0.19.8 (stage3.py) means to let the optimizer work on this rank's shards of the model where both have one
dtype, and compares a device with its name, so that it never does. Its step flattens and casts the gradients of one
sub-group after the other; they lie in one flat buffer in just that order, so here they are used where they are.

Three streams of the device touch the same memory: the current one computes and steps, a second gathers weights ahead of
their use, a third reduces gradients. DeepSpeed orders them by making the host wait for the device, after each backward
pass and, by accident, in the step. Here the streams wait for each other, and the host only where it needs a number.
"""

from __future__ import annotations

import logging
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
from toolkit.optim.statistics import Member, Parameter, Share, small_states
from toolkit.optim.streaming import TensorStep, check_gradient
from toolkit.optim.together import step_together
from toolkit.printable import warn_once
from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import fragments
from toolkit.zero.agreement import Order, have_nothing
from toolkit.zero.exchange import DataParallel, check_whole
from toolkit.zero.gradients import HostCopy, clip_scale, squared_norm, takes_mean

logger = logging.getLogger("toolkit")


class ShardedZeroOptimizer3(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's stage 3 optimizer around a `RuleOptimizer`."""

    optimizer: RuleOptimizer
    offload_optimizer: bool

    def __init__(self, module: nn.Module, init_optimizer: RuleOptimizer, *args: Any, **kwargs: Any) -> None:
        # An optimizer that the JSON names has been checked; one that was handed over has not.
        if init_optimizer.defaults["release_gradients"]:
            raise UserError("release_gradients works at ZeRO stages 1 and 2 only, not at 3")
        self._order = Order()
        if takes_mean(kwargs):
            warn_once(
                logger,
                "prescale_gradients and gradient_predivide_factor have no effect for %s: gradients are divided by the "
                "number of ranks while they are added up",
                type(init_optimizer).__name__,
            )
        super().__init__(module, init_optimizer, *args, **kwargs)
        if self.swap_optimizer:
            raise UserError(f"{type(init_optimizer).__name__}'s state cannot be offloaded to NVMe; use the CPU")
        sizes = {int(dist.get_world_size(self._get_param_partition_group(p))) for g in self.fp16_groups for p in g}
        check_whole(
            init_optimizer,
            split=self.model_parallel_group is not None
            or len(set(map(id, self.sub_group_process_groups))) > 1
            or sizes != {int(dist.get_world_size(self.dp_process_group))},
        )
        self._gathers = self.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
        if not get_accelerator().is_synchronized_device():
            stream = self._gathers  # and not `self`, which the model would keep alive
            # Whatever has written shards, a step or a user, has done so on the current stream.
            module.register_forward_pre_hook(
                lambda *_: stream.wait_stream(get_accelerator().current_stream()), prepend=True
            )
        # Where each parameter's blocks begin in its parameter group, which no sharding changes.
        self._first_block: dict[int, int] = {}
        blocks: dict[int, int] = {}
        for i, params in enumerate(self.fp16_groups):
            group = self.sub_group_to_group_id[i]
            for param in params:
                self._first_block[param.ds_id] = blocks.get(group, 0)
                blocks[group] = blocks.get(group, 0) - (-param.ds_numel // BLOCK)

    def _configure_master_weights(self, *args: Any, **kwargs: Any) -> torch.dtype:
        # Asked for now: later the optimizer has no parameters, or other ones.
        self.holds_weights = self.optimizer.holds_weights()
        dtype = super()._configure_master_weights(*args, **kwargs)
        return torch.bfloat16 if self.holds_weights else dtype

    def _create_fp32_partitions(self) -> None:
        super()._create_fp32_partitions()
        if self.holds_weights:
            for master, own in zip(self.fp32_partitioned_groups_flat, self.fp16_partitioned_groups_flat, strict=True):
                if own is not None and own.device == master.device:
                    master.data = own.data

    def initialize_optimizer_states(self) -> None:
        """State is allocated at the first step, and gradients need no buffer beside `grad_partitions_flat_buffer`."""

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any) -> None:
        """Called for each gradient that is ready to be reduced."""
        check_gradient(param.grad, repr(self.param_names.get(param, "a parameter")))
        self._order.note(param.ds_id)
        super().reduce_independent_p_g_buckets_and_remove_grads(param)

    def _offload_grad_partition_at_boundary(self, *args: Any) -> None:
        """The gradient is on the host already."""

    def independent_gradient_partition_epilogue(self) -> None:
        """The end of a backward pass: reduce what waits, and let what follows wait for the reductions."""
        for dtype in sort_dtypes(self.ipg_buckets.keys()):
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
        _wait_for(self.reduce_and_partition_stream)
        if self.offload_optimizer:
            _host_waits()  # gradients are on their way to the host, which reads them next
        for param_id in self.params_already_reduced:
            self.params_already_reduced[param_id] = False
        self._epilogue_ran_this_backward = True

    def _get_fp32_grad_state_partition(self, param: Any, release_swap_buffers: bool) -> tuple[Tensor, int]:
        return self._gradient_of(param), self.grad_position[self.get_param_id(param)][0]

    def get_fp32_grad_partitions(self) -> dict[int, dict[int, Tensor]]:
        return {
            i: {index: self._gradient_of(param).float() for index, param in enumerate(params)}
            for i, params in enumerate(self.fp16_groups)
        }

    def _gradient_of(self, param: Any) -> Tensor:
        gradients: dict[int, Tensor] = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        return gradients[param.ds_id]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Norm, clipping, update of this rank's shards. A step with gradients that are not finite is skipped."""
        _wait_for(self._gathers)  # which reads shards that the step writes
        reduced = set(self._offload_boundary_param_ids)
        self._pre_step()
        self._partition_all_parameters()
        for params in self.fp16_groups:
            for param in params:
                if param.ds_id not in reduced:  # no part in this step; what is there is an earlier step's
                    self._gradient_of(param).zero_()
        both = HostCopy(self._scaled_norm_and_order()).wait()
        self._order.check(both.tolist()[1], dist.get_world_size(self.dp_process_group))
        known = both[0].float()
        scale_before = self.loss_scale
        self.overflow = is_invalid_grad_norm(known)
        if self._loss_scale_update_and_overflow_cleanup():
            return
        self._global_grad_norm = known / scale_before
        self.timers(OPTIMIZER_STEP_TIMER).start()
        self.zero_grad(set_to_none=True)
        scale = clip_scale(known, self.clip_grad, scale_before)
        scale = scale.to(self.fp32_partitioned_groups_flat[0].device, non_blocking=True)
        members: dict[int, list[Member]] = {}
        start = 0
        for i in range(len(self.fp16_groups)):
            stop = start + self.fp32_partitioned_groups_flat[i].numel()
            members[i] = self._step_sub_group(i, self.grad_partitions_flat_buffer[start:stop], scale)
            start = stop
        together = [member for own in members.values() for member in own]
        self.optimizer.found = step_together(together, scale, DataParallel(self.dp_process_group))
        for i, own in members.items():
            if own:
                self._show(i)
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
        if self.model_parallel_group is not None or len(set(map(id, self.sub_group_process_groups))) > 1:
            self.averaged_gradients = {
                i: [self._gradient_of(param) for param in params] for i, params in enumerate(self.fp16_groups)
            }
            offloaded, self.offload_optimizer = self.offload_optimizer, False
            norm = combine_grad_norm_groups(self._get_norm_groups())  # which knows what is counted how often
            self.offload_optimizer = offloaded
            dist.all_reduce(order, group=self.dp_process_group)
            return torch.stack([norm.double(), order])
        square = squared_norm([self.grad_partitions_flat_buffer], order.device)
        total = torch.stack([square, order])
        dist.all_reduce(total, group=self.dp_process_group)
        return torch.stack([total[0].sqrt(), total[1]])

    def _step_sub_group(self, i: int, gradient: Tensor, scale: Tensor) -> list[Member]:
        """Step a sub-group; what is to be stepped together with others comes back as it is."""
        master = self.fp32_partitioned_groups_flat[i]
        group = self.optimizer.param_groups[self.sub_group_to_group_id[i]]
        begun = self.optimizer.begin(group, master)
        if begun is not None and self.optimizer.rule_of(group).statistics:
            return self._members(i, group, begun, gradient)
        if begun is not None and begun.function.rounds:
            start = 0
            for param in self.fp16_groups[i]:
                size = param.partition_numel()
                stream = begun.stream(start, start + size, first_block=self._block_of(param))
                stream.add(gradient[start : start + size], scale)
                stream.finish(scale)
                start += size
        elif begun is not None:
            stream = begun.stream(first_block=0)
            stream.add(gradient, scale)
            stream.finish(scale)
        self._show(i)
        return []

    def _block_of(self, param: Any) -> int:
        """The number of this rank's first block of `param`, in the whole parameter group and over all ranks."""
        before = self._get_param_partition_rank(param) * param.partition_numel() // BLOCK
        return self._first_block[param.ds_id] + int(before)

    def _members(self, i: int, group: dict[str, Any], begun: TensorStep, gradient: Tensor) -> list[Member]:
        """The parameters of a sub-group and what this rank holds of them, without the padding."""
        params, master = self.fp16_groups[i], self.fp32_partitioned_groups_flat[i]
        parameters = [Parameter(tuple(param.ds_shape), group["component"]) for param in params]
        small = small_states(self.optimizer.rule_of(group), parameters, self.optimizer.state[master], master.device)
        members, offset = [], 0
        for param, parameter, states in zip(params, parameters, small, strict=True):
            part, rank = param.partition_numel(), self._get_param_partition_rank(param)
            held = fragments(0, parameter.numel, size=part, before=offset)
            own = next((fragment for fragment in held if fragment.rank == rank), None)
            share = Share(own, gradient[own.elements], self._block_of(param)) if own is not None else None
            members.append(Member(parameter, begun, states, held, share))
            offset += part
        return members

    def _show(self, i: int) -> None:
        """Give the model the weights of a sub-group, unless they are the model's."""
        own, master = self.fp16_partitioned_groups_flat[i], self.fp32_partitioned_groups_flat[i]
        if own is None or own.data_ptr() != master.data_ptr():  # None: the weights lie on NVMe
            self._reassign_or_swap_out_partitioned_parameters(i)

    def _restore_from_bit16_weights(self) -> None:
        """Weights were put into the model from outside: what was below their last bit is no longer theirs."""
        super()._restore_from_bit16_weights()
        self.optimizer.forget_remainders()


def _wait_for(stream: Any) -> None:
    """Let what is queued from now on begin after what `stream` has to do so far."""
    if not get_accelerator().is_synchronized_device():
        get_accelerator().current_stream().wait_stream(stream)


def _host_waits() -> None:
    if not get_accelerator().is_synchronized_device():
        get_accelerator().current_stream().synchronize()
