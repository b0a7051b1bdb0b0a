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

from toolkit.errors import UserError
from toolkit.optim import RuleOptimizer
from toolkit.optim.scalars import Known
from toolkit.optim.statistics import Member
from toolkit.optim.streaming import TensorStep
from toolkit.optim.together import step_together
from toolkit.printable import warn_once
from toolkit.state.codecs import BLOCK
from toolkit.state.layout import dtype_name
from toolkit.zero.access import NO_GRADIENTS, Access
from toolkit.zero.exchange import DataParallel, check_whole, whole_parameters
from toolkit.zero.gradients import GradientFragment, HostCopy, Reducer, clip_scale, squared_norm, takes_mean
from toolkit.zero.lending import gather_in_place
from toolkit.zero.master import MasterWeights
from toolkit.zero.places import laid_out
from toolkit.zero.shards import Shard, Uncloned, model_weights, shards
from toolkit.zero.turns import OrderedZeroOptimizer

logger = logging.getLogger("toolkit")


def gather_weights(zero: DeepSpeedZeroOptimizer, placed: Sequence[Shard]) -> None:
    """Give the model all ranks' parts of its weights.

    Args:
        zero: DeepSpeed's optimizer of stages 1 and 2, or ours.
        placed: its `shards`.
    """
    if zero.bit16_groups_flat[0].is_cpu:
        for parts, group in zip(zero.parallel_partitioned_bit16_groups, zero.real_dp_process_group, strict=True):
            if len(parts) > 1:
                gather_in_place(parts, group).wait()
    else:
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
    for shard in placed:
        # Parameters are views of `flat` already, and binding them anew takes the host longer than looking.
        flat = zero.bit16_groups_flat[shard.number]
        start, width = flat.data_ptr(), flat.element_size()
        if any(one.param.data_ptr() != start + one.offset * width for one in shard.members if one.param.numel()):
            zero._update_model_bit16_weights(shard.number)


class ShardedZeroOptimizer(Access, MasterWeights, OrderedZeroOptimizer):
    """DeepSpeed's stage 1/2 optimizer around a `RuleOptimizer`.

    Every partition is whole blocks, the same at every world size. `weights` of the `RuleOptimizer` decides whether
    there are master weights. With offload the weights' host copy, their state and gradients lie on the host.
    """

    ready_for_gradients: bool
    _global_grad_norm: Any
    _laying_out = False

    def __init__(self, init_optimizer: RuleOptimizer, *args: Any, **kwargs: Any) -> None:
        self._held: list[dict[int, Tensor]] = [{} for _ in init_optimizer.param_groups]
        self._local: dict[int, Tensor] = {}
        self._scalars: Known = {}  # of the step that has begun
        self._laying_out = True
        ignored = takes_mean(kwargs) or not kwargs.get("reduce_scatter", True)
        super().__init__(init_optimizer, *args, **kwargs)
        self._laying_out = False
        self._ranks = DataParallel(self.dp_process_group)
        check_whole(init_optimizer, split=self.has_moe_layers or self.model_parallel_world_size > 1)
        if ignored:
            warn_once(
                logger,
                "reduce_scatter, prescale_gradients and gradient_predivide_factor have no effect for %s: gradients are "
                "divided by the number of ranks and added up at the rank that owns them",
                type(init_optimizer).__name__,
            )
        # As DeepSpeed: the mean over all data-parallel ranks, or their sum, in whatever group they are added up.
        replicas = self._ranks.size / self.sequence_parallel_size
        self._reducer = Reducer(
            deliver=self._deliver,
            members={id(member.param): member for shard in self._shards for member in shard.members},
            divisor=replicas if self.gradient_average else 1.0,
            bucket_elements=self.reduce_bucket_size,
            dtype=self.communication_data_type,
            overlap=self.overlap_comm,
        )

    # ---- layout -------------------------------------------------------------------------------------------------

    def flatten_dense_tensors_aligned(
        self, tensor_list: list[Tensor], alignment: int, use_cpu_data: bool = False, **kwargs: Any
    ) -> Tensor:
        """Called to lay groups out; `alignment` is twice the world size, of which blocks are a multiple."""
        if self._laying_out:
            ranks = alignment // self.nccl_start_alignment_factor
            if use_cpu_data and get_accelerator().device_name() == "cpu":
                # Set aside, since there is no room for another group: on a CPU that is where they were.
                for param in tensor_list:
                    param.data = param.cpu_data  # type: ignore[attr-defined]
                use_cpu_data = False
            if not (use_cpu_data or any(kwargs.get("param_padding") or ()) or len({x.dtype for x in tensor_list}) > 1):
                return laid_out(tensor_list, ranks)
            alignment = BLOCK * ranks
        return super().flatten_dense_tensors_aligned(tensor_list, alignment, use_cpu_data, **kwargs)

    def get_data_parallel_partitions(self, tensor: Tensor, group_id: int) -> list[Tensor]:
        """Called for each group that is laid out, just before this rank's part becomes master weights."""
        parts: list[Tensor] = super().get_data_parallel_partitions(tensor, group_id)
        if self._laying_out:
            wanted = torch.device(self.device).type, self.master_weights_and_grads_dtype
            if (tensor.device.type, tensor.dtype) != wanted or (self.holds_weights and not self.cpu_offload):
                rank = dist.get_rank(group=self.real_dp_process_group[group_id])
                parts[rank] = parts[rank].as_subclass(Uncloned)
        return parts

    def initialize_optimizer_states(self) -> None:
        """With offload, make room on the host. Called once all groups are laid out."""
        for parts in self.parallel_partitioned_bit16_groups:
            parts[:] = [part.as_subclass(Tensor) for part in parts]
        self._shards = shards(self)
        for shard in self._shards if self.holds_weights else ():
            own = model_weights(self, shard)
            if own.dtype != shard.tensor.dtype and self.cpu_offload:
                raise UserError(
                    f"a parameter group is {dtype_name(own.dtype)} and others are {dtype_name(shard.tensor.dtype)}: "
                    "with offload_optimizer all parameters must have one dtype, to which DeepSpeed would round them."
                )
            if not self.cpu_offload:
                shard.tensor.data = own.data  # of another dtype than the rest of the model DeepSpeed has made a copy
        if self.holds_weights and not self.cpu_offload:
            assert all(shard.tensor.data_ptr() == model_weights(self, shard).data_ptr() for shard in self._shards)
        if self.cpu_offload:
            self._host_gradients = {
                shard.number: self._pinned(torch.zeros(shard.tensor.numel(), dtype=self.gradient_accumulation_dtype))
                for shard in self._waiting_shards()
            }
            # DeepSpeed's staging buffers: weights go to the device as they are, gradients come from it in pieces.
            self.temp_grad_buffer_for_cpu_offload = self.temp_grad_buffer_for_gpu_offload = torch.empty(0)
            if self.holds_weights:
                self.param_buffer_of_bit16_for_cpu_offload_groups = [shard.tensor for shard in self._shards]

    def _waiting_shards(self) -> list[Shard]:
        """Those whose gradients are kept until the step."""
        return self._shards

    def _pinned(self, tensor: Tensor) -> Tensor:
        return get_accelerator().pin_memory(tensor) if self.cpu_offload_pin_memory else tensor

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
        for shard in self._shards:
            for member in shard.members:
                if member.param.grad is not None or id(member.param) in self._local:
                    self.reduce_independent_p_g_buckets_and_remove_grads(member.param, shard.group)
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
        for shard in self._shards:
            held = self._held[shard.group]
            for member in shard.members:
                own, param = member.fragment, member.param
                if own is not None and own.offset not in held:
                    zeros = torch.zeros(own.numel, dtype=param.dtype, device=param.device)
                    self._deliver([param], [GradientFragment(param, shard.group, own.offset, zeros)])
            self.averaged_gradients[shard.group] = [held[offset] for offset in sorted(held)]

    def _this_steps(self, param: Any) -> Tensor | None:
        shard, member = self._placed[id(param)]
        if self.averaged_gradients.get(shard.group) is None:
            raise UserError(NO_GRADIENTS)
        return None if member.fragment is None else self._held[shard.group][member.fragment.offset]

    def _get_offload_gradient_dict(self) -> None:
        for i, params in enumerate(self.params_in_partition):
            found = []
            for param in params if i in self._host_gradients else ():
                _, _, offset, size = self.grad_position[self.get_param_id(param)]
                found.append(self._host_gradients[i][offset : offset + size])
            self.offload_gradient_dict[i] = found

    @property
    def is_open(self) -> bool:
        return self._turns.open

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.is_open:  # the loss was another engine's, whose pass has ended without a word to this one (GANs)
            self._turns.end()
            self.reduce_ipg_grads()
        super().zero_grad(set_to_none)
        self._discard()

    def _discard(self) -> None:
        self._local.clear()
        self._scalars = {}
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
        scale = clip_scale(known, clip, scale_before).to(self._shards[0].tensor.device, non_blocking=True)
        self._step_groups(self._shards, scale)
        self._scalars = {}
        gather_weights(self, self._shards)

    def _must_be_finite(self) -> bool:
        return self.dtype != torch.bfloat16 or self.check_grad_overflow

    def _scaled_norm(self) -> Tensor | None:
        """Global norm of the gradients as they are, fp32, 0-d; None if nobody asks for it."""
        if not self.compute_grad_norm and not (self.check_grad_overflow and self._must_be_finite()):
            return None
        if self.has_moe_layers or self.model_parallel_world_size > 1:
            return self.scaled_global_norm()  # which knows what is counted how often
        mine = [gradient for held in self._held for gradient in held.values()]
        return self._ranks.add(squared_norm(mine, get_accelerator().current_device_name())).sqrt().float()

    def _begin(self, shard: Shard) -> TensorStep | None:
        """Count a step of a group and begin it; None while state is only allocated."""
        return self.optimizer.begin(self.optimizer.param_groups[shard.group], shard.tensor, self._scalars)

    def _taken(self, shard: Shard) -> dict[int, Tensor]:
        """The gradients of a group, which are nobody else's any more."""
        held, self._held[shard.group], self.averaged_gradients[shard.group] = self._held[shard.group], {}, None
        return held

    def _step_groups(self, groups: Sequence[Shard], scale: Tensor) -> None:
        together = []
        for shard in groups:
            if self.optimizer.steps_together(self.optimizer.param_groups[shard.group]):
                together.append(shard)
            else:
                self._step_group(shard, scale)
        self._step_together(together, scale)

    def _step_group(self, shard: Shard, scale: Tensor) -> None:
        held, begun = self._taken(shard), self._begin(shard)
        if begun is not None:
            stream, at = begun.stream(first_block=shard.first_block), 0
            for offset in sorted(held):
                gradient = held.pop(offset)
                if offset > at:  # alignment of single parameters
                    stream.add(gradient.new_zeros(offset - at), scale)
                at = offset + gradient.numel()
                stream.add(gradient, scale)
                del gradient
            stream.finish(scale)
        self._show(shard)

    def _step_together(self, groups: Sequence[Shard], scale: Tensor) -> None:
        """The step of groups whose rule looks at whole parameters: at all of them before any is updated."""
        members: list[Member] = []
        for shard in groups:
            members += self._members(shard)
        self.optimizer.found = step_together(members, scale, self._ranks)
        for shard in groups:
            self._show(shard)

    def _members(self, shard: Shard) -> list[Member]:
        held, begun = self._taken(shard), self._begin(shard)
        if begun is None:
            return []
        return whole_parameters(self.optimizer, shard, begun, lambda own: held.pop(own.offset, None))

    def _show(self, shard: Shard) -> None:
        """Copy this rank's weights of a group into the model, unless they are the model's."""
        source, own = shard.tensor, model_weights(self, shard)
        if self.cpu_offload and not self.holds_weights:
            # Rounded here, so that half as much is transferred.
            source = self.param_buffer_of_bit16_for_cpu_offload_groups[shard.number].copy_(source)
        if source.data_ptr() != own.data_ptr():
            own.copy_(source, non_blocking=True)
