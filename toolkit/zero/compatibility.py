"""Every internal of DeepSpeed that this package relies on, in one table, looked for before it is used.

A DeepSpeed that changed is one sentence at start-up and not wrong numbers in a run.
"""

from __future__ import annotations

import inspect
import sys

import deepspeed.runtime.comm.coalesced_collectives as ds_collectives
import deepspeed.runtime.config as ds_config
import deepspeed.runtime.engine as ds_engine
import deepspeed.runtime.zero.parameter_offload as ds_offload
import deepspeed.runtime.zero.partition_parameters as ds_parameters
import deepspeed.runtime.zero.stage3 as ds_stage3
import deepspeed.utils as ds_utils
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from toolkit.zero import shared_memory

# What `turns.py`, `stage12.py`, `stage3.py`, `release_stages.py` and `shards.py` override, call or read.
_METHODS_1_AND_2 = (
    "_configure_master_weights flatten_dense_tensors_aligned get_data_parallel_partitions initialize_optimizer_states "
    "setup_buckets process_gradients get_gradient_for_reduction reduce_independent_p_g_buckets_and_remove_grads "
    "reduce_ipg_grads reduce_gradients independent_gradient_partition_epilogue finalize_gradient_accumulation_boundary "
    "_get_offload_gradient_dict _maybe_reduce_autoep_folding_tp_gradient _update_model_bit16_weights _update_scale "
    "_restore_from_bit16_weights scaled_global_norm zero_grad _link_all_hp_params"
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
    "_reassign_or_swap_out_partitioned_parameters _get_param_partition_group "
    "checkpoint_event_prologue checkpoint_event_epilogue reduce_ready_partitions_and_remove_grads "
    "_setup_for_real_optimizer partition_grads get_full_hp_param set_full_hp_param get_local_fp32_param "
    "set_local_hp_param get_fp32_grad_for_param set_fp32_grad_for_param get_local_fp32_grad_for_param "
    "set_local_grad_for_param update_fp32_grad_for_param_vectorized _get_param_partition_rank "
    "_get_param_partition_world_size _link_all_hp_params"
)
_FIELDS_3 = (
    "fp16_groups fp32_partitioned_groups_flat fp16_partitioned_groups_flat sub_group_to_group_id grad_position "
    "grad_partitions_flat_buffer __param_id_to_grad_partition _offload_boundary_param_ids "
    "params_already_reduced ipg_buckets persistent_parameters parameter_offload "
    "micro_step_id reduce_and_partition_stream _epilogue_ran_this_backward __reduce_and_partition_ipg_grads"
)
# What `checkpoint.py` replaces or sets while it saves and loads, and `engine.py` for good.
_METHODS_ENGINE = (
    "_take_model_step load_checkpoint save_checkpoint _save_checkpoint _save_zero_checkpoint _copy_recovery_script "
    "_configure_lr_scheduler _broadcast_model backward zero_grad destroy no_sync"
)
_FIELDS_ENGINE = (
    "checkpoint_engine global_steps global_samples skipped_steps micro_steps lr_scheduler "
    "sequence_parallel_size seq_dp_world_size dp_world_size"
)


def _source(kind: type) -> str:
    """Of the whole module: to find where a class ends, Python would take a second of every run's start."""
    return inspect.getsource(sys.modules[kind.__module__])


def _missing(kind: type, methods: str, fields: str) -> list[str]:
    source = _source(kind)
    missing = [name for name in methods.split() if not callable(getattr(kind, name, None))]
    missing += [name for name in fields.split() if f"self.{name}" not in source]
    return [f"{kind.__name__}.{name}" for name in missing]


def incompatibilities() -> list[str]:
    """What this package relies on inside DeepSpeed and does not find; empty on a DeepSpeed that fits."""
    checks = {
        "comm.torch.build_shm_op": shared_memory.found(),
        "runtime.engine.DeepSpeedZeroOptimizer": hasattr(ds_engine, "DeepSpeedZeroOptimizer"),
        "DeepSpeedEngine._configure_basic_optimizer": hasattr(ds_engine.DeepSpeedEngine, "_configure_basic_optimizer"),
        "DeepSpeedEngine._scheduler_from_config(optimizer)": (
            "self._scheduler_from_config(self.optimizer)" in inspect.getsource(ds_engine)
        ),
        "DeepSpeedEngine.backward, which scales for ZeRO alone; FP16_UnfusedOptimizer.unscale_and_clip_grads": (
            "if isinstance(self.optimizer, ZeROOptimizer):\n                loss = self.optimizer.scale_if_loss(loss)"
            in inspect.getsource(ds_engine)
            and "self.unscale_and_clip_grads(self._global_grad_norm)" in _source(FP16_UnfusedOptimizer)
        ),
        "DeepSpeedConfig._param_dict, zero_config, timers_config, scheduler_params": all(
            f"self.{name} = " in inspect.getsource(ds_config)
            for name in ("_param_dict", "zero_config", "timers_config", "scheduler_params")
        ),
        "DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned(tensor_list, alignment, use_cpu_data, ...)": (
            list(inspect.signature(DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned).parameters)[1:4]
            == ["tensor_list", "alignment", "use_cpu_data"]
        ),
        "torch.Tensor._use_count()": hasattr(torch.Tensor, "_use_count"),
        "coalesced_collectives._torch_reduce_scatter_fn(input, output), of which the output is this rank's part": (
            hasattr(ds_collectives, "_torch_reduce_scatter_fn")
            and " tensor_partition_buffer_for_each_rank[this_rank],\n" in inspect.getsource(ds_collectives)
        ),
        "parameter_offload: counts of backward passes; get_full_hp_param and siblings as methods of parameters": all(
            text in source
            for text, source in (
                ("applied_pre_backward_ref_cnt", inspect.getsource(ds_offload)),
                ("ds_grads_remaining", inspect.getsource(ds_offload)),
                ("param.get_full_hp_param(", inspect.getsource(ds_utils.safe_get_full_fp32_param)),
                ("param.set_full_hp_grad(", inspect.getsource(ds_utils.safe_set_full_grad)),
            )
        ),
        "DeepSpeedZeRoOffload.get_param_coordinator()": hasattr(
            ds_offload.DeepSpeedZeRoOffload, "get_param_coordinator"
        ),
        "stage_1_and_2: a clone of this rank's part becomes master weights": (
            "parallel_partitioned_bit16_groups[i][partition_id].detach().clone().to(" in _source(DeepSpeedZeroOptimizer)
        ),
        "zero.Init._padding_size(param)": (
            hasattr(ds_parameters.Init, "_padding_size")
            and list(inspect.signature(ds_parameters.Init._padding_size).parameters) == ["self", "param"]
        ),
        "partition_parameters._dist_allgather_fn(input_tensor, output_tensor, group)": (
            list(inspect.signature(ds_parameters._dist_allgather_fn).parameters)
            == ["input_tensor", "output_tensor", "group"]
        ),
        "partition_parameters._no_gather_coalesced(params)": hasattr(ds_parameters, "_no_gather_coalesced"),
        "DeepSpeedZeRoOffload.__allgather_stream": "self.__allgather_stream = " in inspect.getsource(ds_offload),
        "PartitionedParameterCoordinator.fetch_sub_module(current_submodule, forward), is_complete_trace()": all(
            method in _source(PartitionedParameterCoordinator)
            for method in (
                "fetch_sub_module(self, current_submodule: Module, forward: bool)",
                "is_complete_trace(self)",
            )
        ),
        "utils.set_z3_leaf_module(model, flag), and leaf modules that are gathered whole": (
            list(inspect.signature(ds_utils.set_z3_leaf_module).parameters) == ["model", "flag"]
            and "iter_params(current_submodule, recurse=is_leaf)" in _source(PartitionedParameterCoordinator)
        ),
        "stage3.partition_grads(params_to_release, grad_partitions), and a buffer for gradients on `device`": (
            "self.partition_grads(params_in_bucket, grad_partitions)" in inspect.getsource(ds_stage3)
            and "device=self.device)\n        if self.offload_optimizer_pin_memory" in inspect.getsource(ds_stage3)
        ),
        "stage3: weights that are master weights are not copied where `device` is a device": (
            ".dtype == self.master_weights_and_grads_dtype and" in _source(DeepSpeedZeroOptimizer_Stage3)
            and "self.fp16_partitioned_groups_flat[i].device == self.device" in _source(DeepSpeedZeroOptimizer_Stage3)
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
