"""ZeRO stages 1 and 2 without a second copy of weights and without transients of full size.

DeepSpeed 0.19.8 (stage_1_and_2.py) keeps an fp32 copy of this rank's weights, gathers a group's gradients into one
tensor, casts it to fp32, takes the norm of an fp64 copy, and hands all of it to the optimizer. Here the optimizer's
tensor is this rank's part of the model's own bf16 weights, gradients are used as they lie, piece by piece, and freed,
and the clip factor goes into the compiled step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import all_gather_dp_groups, is_invalid_grad_norm
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor

from toolkit.optim import RuleOptimizer
from toolkit.optim.statistics import Member, Parameter, Share, small_states
from toolkit.optim.streaming import StreamedStep
from toolkit.optim.together import step_together
from toolkit.printable import warn_once
from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import Fragment, fragments
from toolkit.zero.exchange import DataParallel, check_whole
from toolkit.zero.gradients import GradientFragment, HostCopy, Reducer, clip_scale, squared_norm, takes_mean
from toolkit.zero.turns import OrderedZeroOptimizer

logger = logging.getLogger("toolkit")


def gather_weights(zero: DeepSpeedZeroOptimizer) -> None:
    """Give the model all ranks' parts of its weights; `zero` is DeepSpeed's optimizer of stages 1 and 2, or ours."""
    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )
    for i, flat in enumerate(zero.bit16_groups_flat):
        # Parameters are views of `flat` already, and binding them anew takes the host longer than looking.
        start, width = flat.data_ptr(), flat.element_size()
        placed = zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True)
        if any(param.data_ptr() != start + offset * width for param, offset in placed if param.numel()):
            zero._update_model_bit16_weights(i)


class ShardedZeroOptimizer(OrderedZeroOptimizer):
    """DeepSpeed's stage 1/2 optimizer around a `RuleOptimizer`.

    Every partition is whole blocks, the same at every world size. `weights` of the `RuleOptimizer` decides whether
    there are master weights. With offload the weights' host copy, their state and gradients lie on the host.
    """

    optimizer: RuleOptimizer
    ready_for_gradients: bool
    _global_grad_norm: Any
    _laying_out = False

    def __init__(self, init_optimizer: RuleOptimizer, *args: Any, **kwargs: Any) -> None:
        self._held: list[dict[int, Tensor]] = [{} for _ in init_optimizer.param_groups]
        self._local: dict[int, Tensor] = {}
        self._laying_out = True
        ignored = takes_mean(kwargs) or not kwargs.get("reduce_scatter", True)
        super().__init__(init_optimizer, *args, **kwargs)
        self._laying_out = False
        check_whole(init_optimizer, split=self.has_moe_layers or self.model_parallel_world_size > 1)
        if ignored:
            warn_once(
                logger,
                "reduce_scatter, prescale_gradients and gradient_predivide_factor have no effect for %s: gradients are "
                "divided by the number of ranks and added up at the rank that owns them",
                type(init_optimizer).__name__,
            )
        groups, placed = {}, {}
        for i, params in enumerate(self.round_robin_bit16_groups):
            for param, offset in zip(params, self.round_robin_bit16_offsets[i], strict=True):
                groups[id(param)] = i
                placed[id(param)] = fragments(0, param.numel(), size=int(self.partition_size[i]), shift=int(offset))
        # As DeepSpeed: the mean over all data-parallel ranks, or their sum, in whatever group they are added up.
        replicas = dist.get_world_size(self.dp_process_group) / self.sequence_parallel_size
        self._reducer = Reducer(
            deliver=self._deliver,
            groups=groups,
            fragments=placed,
            process_groups=self.real_dp_process_group,
            divisor=replicas if self.gradient_average else 1.0,
            bucket_elements=self.reduce_bucket_size,
            dtype=self.communication_data_type,
            overlap=self.overlap_comm,
        )

    # ---- layout -------------------------------------------------------------------------------------------------

    def flatten_dense_tensors_aligned(
        self, tensor_list: list[Tensor], alignment: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Called to lay groups out; `alignment` is twice the world size, of which blocks are a multiple."""
        if self._laying_out:
            world_size = alignment // self.nccl_start_alignment_factor
            alignment = BLOCK * world_size
        return super().flatten_dense_tensors_aligned(tensor_list, alignment, *args, **kwargs)

    def _configure_master_weights(self, *args: Any, **kwargs: Any) -> torch.dtype:
        # Asked for now: later the optimizer has no parameters, or other ones.
        self.holds_weights = self.optimizer.holds_weights()
        dtype = super()._configure_master_weights(*args, **kwargs)
        return torch.bfloat16 if self.holds_weights else dtype

    def initialize_optimizer_states(self) -> None:
        """Let the optimizer's tensors be the model's own weights, or, with offload, their host copy."""
        if self.cpu_offload:
            self._host_gradients = [
                self._pinned(torch.zeros(int(size), dtype=self.gradient_accumulation_dtype))
                for size in self.partition_size
            ]
            # DeepSpeed's staging buffers: weights go to the device as they are, gradients come from it in pieces.
            self.temp_grad_buffer_for_cpu_offload = self.temp_grad_buffer_for_gpu_offload = torch.empty(0)
            if self.holds_weights:
                self.param_buffer_of_bit16_for_cpu_offload_groups = list(self.single_partition_of_fp32_groups)
            return
        if self.holds_weights:
            for i, master in enumerate(self.single_partition_of_fp32_groups):
                master.data = self._own_weights(i).data

    def _pinned(self, tensor: Tensor) -> Tensor:
        return get_accelerator().pin_memory(tensor) if self.cpu_offload_pin_memory else tensor

    def _own_weights(self, i: int) -> Tensor:
        rank = dist.get_rank(group=self.real_dp_process_group[i])
        own: Tensor = self.parallel_partitioned_bit16_groups[i][rank]
        return own

    def own_fragment(self, param: Tensor) -> Fragment | None:
        """What this rank holds of `param`."""
        rank = dist.get_rank(group=self.real_dp_process_group[self._reducer.groups[id(param)]])
        return next((part for part in self._reducer.fragments[id(param)] if part.rank == rank), None)

    # ---- gradients ----------------------------------------------------------------------------------------------

    def setup_buckets(self) -> None:
        if not self.ready_for_gradients:
            self.micro_step_id += 1
            self.ready_for_gradients = True

    def process_gradients(self, param: Tensor, i: int) -> None:
        """Called for each parameter as soon as autograd has its gradient."""
        if self._coalesce_grad_reduction:
            return
        self.setup_buckets()
        if self.partition_gradients or self.is_gradient_accumulation_boundary():
            self.reduce_independent_p_g_buckets_and_remove_grads(param, i)
        elif self.gradient_accumulation_dtype != param.dtype:
            self._local[id(param)] = self._gradient_of(param)

    def _gradient_of(self, param: Tensor) -> Tensor:
        """The gradient, taken from `param`, and what stage 1 has accumulated of it."""
        gradient, param.grad = param.grad, None
        assert gradient is not None
        before = self._local.pop(id(param), None)
        if before is not None:
            return before.add_(gradient)
        wide = not self.partition_gradients and not self.is_gradient_accumulation_boundary()
        return gradient.to(self.gradient_accumulation_dtype) if wide else gradient

    def get_gradient_for_reduction(self, param: Tensor) -> Tensor | None:
        return param.grad

    def _take(self, param: Tensor, i: int) -> None:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        self._maybe_reduce_autoep_folding_tp_gradient(param, param.grad)
        self._reducer.add(param, self._gradient_of(param))

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        self._reducer.flush()
        self._reducer.wait()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Stage 1, at the end of the last micro-batch: what the hooks have not seen."""
        for i, group in enumerate(self.bit16_groups):
            for param in group:
                if param.grad is not None or id(param) in self._local:
                    self.reduce_independent_p_g_buckets_and_remove_grads(param, i)
        self.overlapping_partition_gradients_reduce_epilogue()

    def independent_gradient_partition_epilogue(self) -> None:
        self._turns.end()
        self.reduce_ipg_grads()
        self.ready_for_gradients = False
        self._epilogue_ran_this_backward = True
        if self.is_gradient_accumulation_boundary():
            self._publish()

    def finalize_gradient_accumulation_boundary(self) -> None:
        self.set_gradient_accumulation_boundary(True)
        if not self.partition_gradients:
            self.reduce_gradients()
        self._publish()

    def _deliver(self, params: Sequence[Tensor], pieces: list[GradientFragment]) -> None:
        for piece in pieces:
            held = self._held[piece.group]
            if self.cpu_offload:
                size = piece.gradient.numel()
                host = self._host_gradients[piece.group][piece.offset : piece.offset + size]
                gradient = piece.gradient.to(host.dtype)
                if piece.offset in held:
                    # Added on the device: a CPU takes longer for it than the transfers.
                    gradient = gradient + host.to(gradient.device, non_blocking=True)
                host.copy_(gradient, non_blocking=True)
                held[piece.offset] = host
            elif piece.offset in held:
                held[piece.offset].add_(piece.gradient)
            else:
                held[piece.offset] = piece.gradient.to(self.gradient_accumulation_dtype)

    def _publish(self) -> None:
        """Show gradients where DeepSpeed's `safe_get_full_grad` looks for them; zeros for parameters without."""
        for i, params in enumerate(self.params_in_partition):
            for param in params:
                own = self.own_fragment(param)
                if own is not None and own.offset not in self._held[i]:
                    zeros = torch.zeros(own.numel, dtype=param.dtype, device=param.device)
                    self._deliver([param], [GradientFragment(param, i, own.offset, zeros)])
            self.averaged_gradients[i] = [self._held[i][offset] for offset in sorted(self._held[i])]

    def _get_offload_gradient_dict(self) -> None:
        for i, params in enumerate(self.params_in_partition):
            found = []
            for param in params:
                _, _, offset, size = self.grad_position[self.get_param_id(param)]
                found.append(self._host_gradients[i][offset : offset + size])
            self.offload_gradient_dict[i] = found

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._discard()

    def _discard(self) -> None:
        self._local.clear()
        for i, held in enumerate(self._held):
            held.clear()
            self.averaged_gradients[i] = None

    # ---- the step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Norm, clipping, update of this rank's weights, all-gather. A step with gradients that are not finite is
        skipped, as DeepSpeed's is."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        if self.cpu_offload and not get_accelerator().is_synchronized_device():
            get_accelerator().current_stream().synchronize()  # gradients are still on their way to the host
        norm = self._scaled_norm()
        scale_before = self.loss_scale
        known = norm if norm is not None else torch.zeros(())
        if self._must_be_finite() or self.cpu_offload:
            # The host decides whether the step is queued at all: on the device, to leave weights and state as they
            # are would be one more select for each number that the step writes.
            known = HostCopy(known).wait()
        self.overflow = norm is not None and self._must_be_finite() and is_invalid_grad_norm(known)
        self._update_scale(self.overflow)
        if self.overflow:
            self._global_grad_norm = float("inf") if self.compute_grad_norm else None
            self.zero_grad()
            return
        self._global_grad_norm = known / scale_before if self.compute_grad_norm and norm is not None else None
        clip = self.clip_grad if norm is not None else 0.0
        device = self.single_partition_of_fp32_groups[0].device
        scale = clip_scale(known, clip, scale_before).to(device, non_blocking=True)
        together = [bool(self.optimizer.rule_of(group).statistics) for group in self.optimizer.param_groups]
        for i, whole in enumerate(together):
            if not whole:
                self._step_group(i, scale)
        self._step_together([i for i, whole in enumerate(together) if whole], scale)
        gather_weights(self)

    def _must_be_finite(self) -> bool:
        return self.dtype != torch.bfloat16 or self.check_grad_overflow

    def _scaled_norm(self) -> Tensor | None:
        """Global norm of the gradients as they are, fp32, 0-d; None if nobody asks for it."""
        if not self.compute_grad_norm and not (self.check_grad_overflow and self._must_be_finite()):
            return None
        if self.has_moe_layers or self.model_parallel_world_size > 1:
            return self.scaled_global_norm()  # which knows what is counted how often
        mine = [gradient for held in self._held for gradient in held.values()]
        total = squared_norm(mine, get_accelerator().current_device_name())
        dist.all_reduce(total, group=self.dp_process_group)
        return total.sqrt().float()

    def _stream(self, i: int) -> StreamedStep | None:
        """Count a step of group `i` and begin it; None while state is only allocated."""
        begun = self.optimizer.begin(self.optimizer.param_groups[i], self.single_partition_of_fp32_groups[i])
        if begun is None:
            return None
        rank = dist.get_rank(group=self.real_dp_process_group[i])
        return begun.stream(first_block=rank * int(self.partition_size[i]) // BLOCK)

    def _step_group(self, i: int, scale: Tensor) -> None:
        held, self._held[i], self.averaged_gradients[i] = self._held[i], {}, None
        stream = self._stream(i)
        if stream is not None:
            at = 0
            for offset in sorted(held):
                gradient = held.pop(offset)
                if offset > at:  # alignment of single parameters
                    stream.add(gradient.new_zeros(offset - at), scale)
                at = offset + gradient.numel()
                stream.add(gradient, scale)
                del gradient
            stream.finish(scale)
        self._show(i)

    def _step_together(self, groups: Sequence[int], scale: Tensor) -> None:
        """The step of groups whose rule looks at whole parameters: at all of them before any is updated."""
        members: list[Member] = []
        for i in groups:
            held, self._held[i], self.averaged_gradients[i] = self._held[i], {}, None
            members += self._members(i, held)
        self.optimizer.found = step_together(members, scale, DataParallel(self.dp_process_group))
        for i in groups:
            self._show(i)

    def _members(self, i: int, held: dict[int, Tensor]) -> list[Member]:
        """The parameters of group `i` and what this rank holds of them; none while state is only allocated."""
        group, flat = self.optimizer.param_groups[i], self.single_partition_of_fp32_groups[i]
        begun = self.optimizer.begin(group, flat)
        if begun is None:
            return []
        params, rank = self.round_robin_bit16_groups[i], dist.get_rank(group=self.real_dp_process_group[i])
        parameters = [Parameter(tuple(param.shape), group["component"]) for param in params]
        small = small_states(self.optimizer.rule_of(group), parameters, self.optimizer.state[flat], flat.device)
        members, base = [], rank * int(self.partition_size[i])
        for param, parameter, states in zip(params, parameters, small, strict=True):
            own, share = self.own_fragment(param), None
            if own is not None and own.offset in held:
                share = Share(own, held.pop(own.offset), (base + own.offset) // BLOCK)
            members.append(Member(parameter, begun, states, self._reducer.fragments[id(param)], share))
        return members

    def _show(self, i: int) -> None:
        """Copy this rank's weights of group `i` into the model, unless they are the model's."""
        source, own = self.single_partition_of_fp32_groups[i], self._own_weights(i)
        if self.cpu_offload and not self.holds_weights:
            # Rounded here, so that half as much is transferred.
            source = self.param_buffer_of_bit16_for_cpu_offload_groups[i].copy_(source)
        if source.data_ptr() != own.data_ptr():
            own.copy_(source, non_blocking=True)

    def _restore_from_bit16_weights(self) -> None:
        """Weights were put into the model from outside: what was below their last bit is no longer theirs."""
        super()._restore_from_bit16_weights()
        self.optimizer.forget_remainders()
