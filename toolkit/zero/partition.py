"""Shards that are whole blocks, so that the block grid is the same at every world size.

DeepSpeed 0.19 cuts partitions anywhere. Stages 1 and 2 flatten each parameter group and split it evenly:
`stage12.ShardedZeroOptimizer` pads the group to blocks times world size. Stage 3 splits each parameter: `install()`
pads parameters likewise, which takes four small replacements in DeepSpeed's modules, since each of them works out a
partition's size for itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import deepspeed.runtime.config as ds_config
import deepspeed.runtime.engine as ds_engine
import deepspeed.runtime.zero.parameter_offload as ds_offload
import deepspeed.runtime.zero.partition_parameters as ds_parameters
import deepspeed.runtime.zero.stage3 as ds_stage3
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from toolkit.errors import UserError
from toolkit.state.sharding import share_of
from toolkit.zero.agreement import check_first_gathers
from toolkit.zero.shards import members


def padding(shape: Sequence[int], world_size: int) -> int:
    """Elements that stage 3 adds to a parameter of `shape`, so that each rank's part is whole blocks.

    1-D parameters have fp32 state and no blocks: they keep DeepSpeed's own layout, a multiple of world size.
    """
    return share_of(shape, world_size) * world_size - math.prod(shape)


def _padding_size(self: Any, param: Any) -> int:
    return padding(param.ds_shape, self._partition_world_size(param))


_allgather = ds_parameters._dist_allgather_fn


def _allgather_whole_blocks(input_tensor: Tensor, output_tensor: Tensor, group: Any = None) -> Any:
    """partition_parameters._dist_allgather_fn, into a buffer that may lack room for the padding.

    DeepSpeed sizes the buffer of a parameter that it gathers alone by its numel and the world size.
    """
    full = input_tensor.numel() * torch.distributed.get_world_size(group)
    if full <= output_tensor.numel():
        return _allgather(input_tensor, output_tensor, group)
    gathered = output_tensor.new_empty(full)
    return _CopyAfterwards(_allgather(input_tensor, gathered, group), gathered, output_tensor)


class _CopyAfterwards:
    """The handle of a collective whose result is copied, less its end, once it is there."""

    def __init__(self, handle: Any, source: Tensor, target: Tensor) -> None:
        self._handle, self._source, self._target = handle, source, target

    def wait(self, **kwargs: Any) -> None:
        self._handle.wait(**kwargs)
        self._target.copy_(self._source[: self._target.numel()])


_reduce_scatter = ds_stage3.reduce_scatter_coalesced
_no_gather = ds_parameters._no_gather_coalesced


def _reduce_scatter_whole_blocks(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """coalesced_collectives.reduce_scatter_coalesced on gradients padded (with zeros) like the parameters."""
    world_size = torch.distributed.get_world_size(group)
    extra = [padding(tensor.shape, world_size) for tensor in tensors]
    return _reduce_scatter(
        [torch.nn.functional.pad(t.reshape(-1), (0, n)) if n else t for t, n in zip(tensors, extra, strict=True)], group
    )


def _no_gather_on_stream(params: Iterable[Any]) -> Any:
    """partition_parameters._no_gather_coalesced, where one rank holds the parameter and its padding."""
    held = list(params)
    if any(hasattr(param.ds_tensor, "ds_quant_scale") for param in held):
        return _no_gather(held)
    return _LocalHandle(held)


class _LocalHandle:
    """partition_parameters.NoGatherCoalescedHandle, less the padding, and without the host waiting for the copies."""

    def __init__(self, params: list[Any]) -> None:
        self._params = params
        device = ds_parameters.get_accelerator()
        for param in params:
            assert param.ds_status == ds_parameters.ZeroParamStatus.NOT_AVAILABLE, param.ds_summary()
            param.ds_status = ds_parameters.ZeroParamStatus.INFLIGHT
            local = param.ds_tensor.data.to(device=device.current_device_name(), non_blocking=True)
            param.data = local.narrow(0, 0, param.ds_numel).view(param.ds_shape)
        self._copied = None if device.is_synchronized_device() else device.Event()
        if self._copied is not None:
            self._copied.record()

    def wait(self, **_: Any) -> None:
        # Several parameters share a handle: by the time of a later one's use an earlier one may be released.
        if self._copied is not None:
            ds_parameters.get_accelerator().current_stream().wait_event(self._copied)
        for param in self._params:
            param.ds_status = ds_parameters.ZeroParamStatus.AVAILABLE
        self._params = []


# What `turns.py`, `stage12.py` and `stage3.py` override, call or read.
_METHODS_1_AND_2 = (
    "_configure_master_weights flatten_dense_tensors_aligned initialize_optimizer_states setup_buckets "
    "process_gradients get_gradient_for_reduction reduce_independent_p_g_buckets_and_remove_grads reduce_ipg_grads "
    "reduce_gradients independent_gradient_partition_epilogue finalize_gradient_accumulation_boundary "
    "_get_offload_gradient_dict _maybe_reduce_autoep_folding_tp_gradient _update_model_bit16_weights _update_scale "
    "_restore_from_bit16_weights scaled_global_norm zero_grad"
)
_FIELDS_1_AND_2 = (
    "round_robin_bit16_groups round_robin_bit16_offsets parallel_partitioned_bit16_groups partition_size "
    "single_partition_of_fp32_groups param_buffer_of_bit16_for_cpu_offload_groups averaged_gradients "
    "offload_gradient_dict params_in_partition grad_position ready_for_gradients _coalesce_grad_reduction "
    "bit16_groups_flat real_dp_process_group allgather_bucket_size nccl_start_alignment_factor param_names "
    "use_grad_accum_attribute"
)
_METHODS_3 = (
    "_configure_master_weights _create_fp32_partitions initialize_optimizer_states _get_norm_groups _pre_step "
    "_offload_grad_partition_at_boundary _get_fp32_grad_state_partition get_fp32_grad_partitions "
    "independent_gradient_partition_epilogue invalidate_secondary_tensor _partition_all_parameters "
    "_loss_scale_update_and_overflow_cleanup _restore_from_bit16_weights "
    "_reassign_or_swap_out_partitioned_parameters _get_param_partition_rank _get_param_partition_group "
    "checkpoint_event_prologue checkpoint_event_epilogue reduce_ready_partitions_and_remove_grads"
)
_FIELDS_3 = (
    "fp16_groups fp32_partitioned_groups_flat fp16_partitioned_groups_flat sub_group_to_group_id grad_position "
    "grad_partitions_flat_buffer __param_id_to_grad_partition _offload_boundary_param_ids sub_group_process_groups "
    "fp16_partitioned_groups unflatten params_already_reduced ipg_buckets persistent_parameters parameter_offload "
    "reduce_and_partition_stream _epilogue_ran_this_backward __reduce_and_partition_ipg_grads"
)
# What `checkpoint.py` replaces or sets while it saves and loads, and `engine.py` for good.
_METHODS_ENGINE = (
    "_take_model_step load_checkpoint save_checkpoint _save_checkpoint _save_zero_checkpoint _copy_recovery_script "
    "_configure_lr_scheduler"
)
_FIELDS_ENGINE = "checkpoint_engine global_steps global_samples skipped_steps micro_steps lr_scheduler"


def _missing(kind: type, methods: str, fields: str) -> list[str]:
    source = inspect.getsource(kind)
    missing = [name for name in methods.split() if not callable(getattr(kind, name, None))]
    missing += [name for name in fields.split() if f"self.{name}" not in source]
    return [f"{kind.__name__}.{name}" for name in missing]


def incompatibilities() -> list[str]:
    """What this package relies on inside DeepSpeed and does not find; empty on a DeepSpeed that fits."""
    checks = {
        "runtime.engine.DeepSpeedZeroOptimizer": hasattr(ds_engine, "DeepSpeedZeroOptimizer"),
        "DeepSpeedEngine._configure_basic_optimizer": hasattr(ds_engine.DeepSpeedEngine, "_configure_basic_optimizer"),
        "DeepSpeedEngine._scheduler_from_config(optimizer)": (
            "self._scheduler_from_config(self.optimizer)" in inspect.getsource(ds_engine.DeepSpeedEngine)
        ),
        "DeepSpeedConfig._param_dict, zero_config, timers_config, scheduler_params": all(
            f"self.{name} = " in inspect.getsource(ds_config)
            for name in ("_param_dict", "zero_config", "timers_config", "scheduler_params")
        ),
        "DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned(tensor_list, alignment, ...)": (
            list(inspect.signature(DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned).parameters)[1:3]
            == ["tensor_list", "alignment"]
        ),
        "zero.Init._padding_size(param)": (
            hasattr(ds_parameters.Init, "_padding_size")
            and list(inspect.signature(ds_parameters.Init._padding_size).parameters) == ["self", "param"]
        ),
        "partition_parameters._dist_allgather_fn(input_tensor, output_tensor, group)": (
            list(inspect.signature(_allgather).parameters) == ["input_tensor", "output_tensor", "group"]
        ),
        "partition_parameters._no_gather_coalesced(params)": hasattr(ds_parameters, "_no_gather_coalesced"),
        "DeepSpeedZeRoOffload.__allgather_stream": "self.__allgather_stream = " in inspect.getsource(ds_offload),
        "PartitionedParameterCoordinator.fetch_sub_module(current_submodule, forward), is_complete_trace()": all(
            method in inspect.getsource(PartitionedParameterCoordinator)
            for method in (
                "fetch_sub_module(self, current_submodule: Module, forward: bool)",
                "is_complete_trace(self)",
            )
        ),
        "stage3.reduce_scatter_coalesced(tensors, group)": (
            "reduce_scatter_coalesced(full_grads_for_rank, process_group)" in inspect.getsource(ds_stage3)
        ),
    }
    return [
        *(name for name, found in checks.items() if not found),
        *_missing(DeepSpeedZeroOptimizer, _METHODS_1_AND_2, _FIELDS_1_AND_2),
        *_missing(DeepSpeedZeroOptimizer_Stage3, _METHODS_3, _FIELDS_3),
        *_missing(ds_engine.DeepSpeedEngine, _METHODS_ENGINE, _FIELDS_ENGINE),
    ]


def install() -> None:
    """Put the whole-block layout in place, for this process and all engines it makes from now on.

    Engines with another optimizer keep DeepSpeed's layout at stages 1 and 2; at stage 3 their matrices are
    padded by less than BLOCK elements per rank, which changes no number.
    """
    ds_parameters.Init._padding_size = _padding_size
    ds_parameters._dist_allgather_fn = _allgather_whole_blocks
    ds_parameters._no_gather_coalesced = _no_gather_on_stream
    ds_stage3.reduce_scatter_coalesced = _reduce_scatter_whole_blocks
    check_first_gathers()


def check_stage_3(zero_optimizer: Any) -> None:
    """Refuse the ways of reducing gradients that cut them by another layout than the parameters.

    Raises UserError. They are stage3.py's `__avg_scatter_contiguous_grads` and `all_to_all_quant_reduce`.
    """
    if not zero_optimizer.reduce_scatter:
        raise UserError(
            "zero_optimization.reduce_scatter is false, but at stage 3 gradients are cut into whole blocks, for which "
            "it must be true (the default)"
        )
    if zero_optimizer.all2all_process_group is not None:
        raise UserError(
            "zero_optimization.zero_quantized_gradients does not cut gradients into whole blocks; leave it out"
        )


@torch.no_grad()
def zero_padding(zero_optimizer: Any) -> None:
    """Clear what lies behind the end of each stage 3 parameter: DeepSpeed leaves it uninitialised."""
    for shard, member in members(zero_optimizer):
        held = 0 if member.fragment is None else member.fragment.numel
        shard.tensor[member.offset + held : member.offset + member.share].zero_()
