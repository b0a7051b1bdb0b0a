"""The ZeRO optimizers that release gradients (`release.py`), of stages 1 and 2 and of stage 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.optim import RuleOptimizer
from toolkit.zero.gradients import GradientFragment
from toolkit.zero.release import SPLIT, Releasing
from toolkit.zero.shards import Shard
from toolkit.zero.stage3 import ShardedZeroOptimizer3, wait_for
from toolkit.zero.stage12 import ShardedZeroOptimizer, gather_weights


class ReleasingZeroOptimizer(Releasing, ShardedZeroOptimizer):
    """Stages 1 and 2 with `release_gradients`."""

    def __init__(self, init_optimizer: RuleOptimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(init_optimizer, *args, **kwargs)
        self._plan()
        if self.has_moe_layers or self.model_parallel_world_size > 1:
            raise UserError(f"optimizer.params.release_gradients {SPLIT}")

    def _deliver(self, params: Sequence[Tensor], pieces: list[GradientFragment]) -> None:
        self._reduced(params, pieces)

    def _hold(self, pieces: list[GradientFragment]) -> None:
        for piece in pieces:
            piece.gradient = piece.gradient.clone()  # a view would keep the whole bucket until then
        super()._deliver([piece.param for piece in pieces], pieces)

    def _publish(self) -> None:
        """Most gradients are gone; there is nothing to show."""

    def _this_steps(self, param: Any) -> Tensor | None:
        raise UserError(self._gone(param))

    def _step_late(self, late: list[Shard], scale: Tensor) -> None:
        self._step_groups(late, scale)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update what waited, and gather the weights."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        self._finish()
        self._discard()
        for shard in self._shards:
            self._show(shard)
        gather_weights(self, self._shards)
        self._start()


class ReleasingZeroOptimizer3(Releasing, ShardedZeroOptimizer3):
    """Stage 3 with `release_gradients`: shards are stepped on the stream that reduces gradients."""

    def __init__(self, module: nn.Module, init_optimizer: RuleOptimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(module, init_optimizer, *args, **kwargs)
        if not self._one_group:
            raise UserError(f"optimizer.params.release_gradients {SPLIT}")

    def _setup_for_real_optimizer(self) -> None:
        """DeepSpeed makes a buffer for all gradients here; there is one for those that are held."""
        device, pins = self.device, self.offload_optimizer_pin_memory
        super()._setup_for_real_optimizer()
        self.device, self.offload_optimizer_pin_memory = device, pins
        size = sum(shard.tensor.numel() for shard in self._late)
        held_gradients = torch.zeros(size, dtype=self.gradient_accumulation_dtype, device=device)
        self.grad_partitions_flat_buffer = get_accelerator().pin_memory(held_gradients) if pins else held_gradients
        held = [member for shard in self._late for member in shard.members]
        parts = self.grad_partitions_flat_buffer.split([member.share for member in held])
        self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition = {
            member.param.ds_id: part for member, part in zip(held, parts, strict=True)
        }

    def initialize_optimizer_states(self) -> None:
        """Called right before DeepSpeed makes that buffer, which takes no memory on this device."""
        super().initialize_optimizer_states()
        self._plan()
        self.device, self.offload_optimizer_pin_memory = torch.device("meta"), False

    def _gradient_of(self, param: Any) -> Tensor:
        gradients = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        if param.ds_id not in gradients:
            raise UserError(self._gone(param))
        return super()._gradient_of(param)

    @torch.no_grad()
    def partition_grads(self, params_to_release: list[Any], grad_partitions: list[Tensor]) -> None:
        """Called for each bucket that has been reduced, on the stream that reduced it."""
        pieces = []
        buckets = [bucket.buffer for bucket in self.ipg_buckets.values() if bucket.buffer is not None]
        overwritten = {buffer.untyped_storage().data_ptr() for buffer in buckets}
        for param, gradient in zip(params_to_release, grad_partitions, strict=True):
            storage = gradient.untyped_storage()
            # One rank's only gradient of a bucket may be all of the bucket's buffer.
            shared = storage.nbytes() > gradient.nbytes or storage.data_ptr() in overwritten
            waits = self._delays and not self._offloads
            own = gradient.clone() if waits and shared else gradient  # the next bucket overwrites this one
            member = self._placed[id(param)][1]
            pieces.append(GradientFragment(param, member.group, member.offset, own.view(-1)))
            if param.grad is not None and not get_accelerator().is_synchronized_device():
                param.grad.record_stream(get_accelerator().current_stream())
            param.grad = None
        self._reduced(list(params_to_release), pieces)

    def offload_states(self, include: Any = None, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's, which would expect a buffer for all gradients when they come back."""
        if include is None or OffloadStateTypeEnum.lp_grads in include:
            raise UserError(
                "engine.offload_states cannot move gradients, which optimizer.params.release_gradients frees as soon "
                "as each has been used; give it an include without OffloadStateTypeEnum.lp_grads."
            )
        super().offload_states(include, *args, **kwargs)

    def _hold(self, pieces: list[GradientFragment]) -> None:
        for piece in pieces:
            self._gradient_of(piece.param).copy_(piece.gradient)

    def _step_late(self, late: list[Shard], scale: Tensor) -> None:
        for member in (member for shard in late for member in shard.members):
            if id(member.param) not in self._seen:
                self._gradient_of(member.param).zero_()
        self._step_sub_groups(late, scale)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update what waited; what stays whole between steps is gathered."""
        wait_for(self._gathers)  # which reads shards that the step writes
        self._pre_step()
        self._partition_all_parameters()
        if not get_accelerator().is_synchronized_device():
            self.reduce_and_partition_stream.wait_stream(get_accelerator().current_stream())
        with get_accelerator().stream(self.reduce_and_partition_stream):
            self._finish()
            for shard in self._shards:
                self._show(shard)
        wait_for(self.reduce_and_partition_stream)
        self._start()
        self.zero_grad(set_to_none=True)
        self._scalars = {}
        self.invalidate_secondary_tensor()
        self._gather_persistent()
