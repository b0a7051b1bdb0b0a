"""A space of DeepSpeed configs: optimizers, stages and precisions, with one value of every other setting."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from engines import BASE

Config = dict[str, Any]

RULES: list[Config] = [
    {"type": "AMCS", "params": {"lr": 5e-4, "total_steps": 10, "compile": False}},
    {"type": "SOAM", "params": {"lr": 5e-4, "compile": False, "state_format": "minimal"}},
    {"type": "AMCS", "params": {"total_steps": 10, "compile": False, "weights": "fp32"}},
    {"type": "AMCS", "params": {"alpha": 0.5, "compile": False, "mode": "single", "release_gradients": True}},
]
OPTIMIZERS: list[Config] = [
    *({"type": name} for name in ("Adam", "AdamW", "Muon", "Lion", "Lamb", "Adagrad", "MuAdam")),
    {"type": "AdamW", "params": {"torch_adam": True, "amsgrad": True}},
    {"type": "AdamW", "params": {"amsgrad": True}},
    {"type": "Adam", "params": {"betas": [0.9, 0.9, 0.9]}},
    {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
    {"type": "SGD", "params": {"nesterov": True}},
    *(
        {"type": name}
        for name in ("Adadelta", "Adafactor", "ASGD", "Adamax", "LBFGS", "NAdam", "RMSprop", "SparseAdam")
    ),
]
PRECISIONS: list[Config] = [{}, {"bf16": {"enabled": False}}, {"bf16": {"enabled": False}, "fp16": {"enabled": True}}]

_HOST = {"device": "cpu"}
_ZERO: list[Config] = [
    *({key: False} for key in (
        "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions",
        "overlap_comm", "compute_grad_norm", "load_from_fp32_weights", "ignore_unused_parameters",
        "memory_efficient_linear", "override_module_apply",
    )),
    *({key: True} for key in (
        "overlap_comm", "elastic_checkpoint", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory",
        "legacy_stage1", "round_robin_gradients", "parameter_alignment", "pipeline_loading_checkpoint",
        "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients", "log_trace_cache_warnings", "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory",
    )),
    *({key: 0} for key in (
        "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        "zero_hpz_partition_size",
    )),
    {"reduce_bucket_size": 1}, {"allgather_bucket_size": 7}, {"stage3_module_granularity_threshold": 100},
    {"zero_hpz_partition_size": 2}, {"leaf_module": {"names": ["block"]}},
    {"offload_optimizer": _HOST}, {"offload_param": _HOST}, {"offload_optimizer": _HOST, "offload_param": _HOST},
    {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    {"offload_optimizer": {"device": "cpu", "super_offload": True}},
    {"offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 0}},
    {"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}, {"zenflow": {}},
    {"zenflow": {"update_interval": 4}, "offload_optimizer": _HOST},
]  # fmt: skip
SCHEDULERS: list[Config] = [
    {"type": "WarmupLR"},
    {"type": "LRRangeTest"},
    {"type": "OneCycle", "params": {"cycle_min_lr": 0.0, "cycle_max_lr": 0.1}},
    {"type": "WarmupDecayLR", "params": {"total_num_steps": 4, "warmup_num_steps": 2}},
    {"type": "StepLR", "params": {"step_size": 1}},
    {"type": "PolynomialLR"},
    {"type": "CosineAnnealingLR", "params": {"T_max": 10}},
    {"type": "CyclicLR", "params": {"base_lr": 0.001, "max_lr": 0.01}},
    {"type": "OneCycleLR", "params": {"max_lr": 0.01, "total_steps": 5, "cycle_momentum": False}},
    {"type": "ReduceLROnPlateau"},
]
_MASTERS = {"bf16_master_weights_and_grads": True}
_TOP: list[Config] = [
    {"managed_gradient_accumulation": False}, {"gradient_allreduce_op": "sum"}, {"gradient_predivide_factor": 2.0},
    {"prescale_gradients": True}, {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
    {"communication_data_type": "fp32"}, {"communication_data_type": "BF16"},
    {"seq_parallel_communication_data_type": "bf16"}, {"disable_allgather": True}, {"disable_python_gc": True},
    {"dump_state": True}, {"log_level": "error"}, {"log_level": "loud"}, {"memory_breakdown": True},
    {"steps_per_print": 1}, {"steps_per_print": 0}, {"steps_per_print": float("inf")}, {"vocabulary_size": 100},
    {"wall_clock_breakdown": True}, {"use_data_before_expert_parallelism": True},
    {"data_parallel_size": 1, "sequence_parallel_size": 1}, {"sequence_parallel_size": 2},
    {"gradient_clipping": 1.0}, {"gradient_accumulation_steps": 2, "train_batch_size": 2},
    {"zero_force_ds_cpu_optimizer": True}, {"zero_allow_untested_optimizer": False},
    {"torch_autocast": {"enabled": True}}, {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
    {"torch_autocast": {"enabled": True, "dtype": "fp16"}},
    {"torch_autocast": {"enabled": True, "dtype": "bf16", "lower_precision_safe_modules": ["no.such.Module"]}},
    {"data_types": {"grad_accum_dtype": "fp32"}}, {"data_types": {"grad_accum_dtype": "bf16"}},
    {"data_types": {"buffer_dtype": "bf16"}}, {"data_types": {"keep_in_fp32_modules": ["norm"]}},
    {"tensor_parallel": {"autotp_size": 1}}, {"tensor_parallel": {"autotp_size": 2}},
    {"expert_parallel": {"enabled": True}}, {"pipeline": {"stages": 2}},
    {"activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True}},
    {"autotuning": {"enabled": True}}, {"checkpoint": {"load_universal": True}},
    {"checkpoint": {"writer": {"type": "fast"}}}, {"checkpoint": {"parallel_write": {"pipeline_stage": True}}},
    {"comms_logger": {"enabled": True, "verbose": True}}, {"compile": {"deepcompile": True}},
    {"compile": {"offload_activation": True}},
    {"data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}}},
    {"data_efficiency": {"enabled": True, "data_routing": {"enabled": True, "random_ltd": {"enabled": True}}}},
    {"datastates_ckpt": {}}, {"flops_profiler": {"enabled": True, "detailed": False}},
    {"hybrid_engine": {"enabled": True}},
    {"timers": {"throughput": {"enabled": False}}}, {"tensorboard": {"enabled": True}}, {"wandb": {"enabled": True}},
    {"comet": {"enabled": True}}, {"bf16": {"immediate_grad_update": True}}, {"bf16": {"check_grad_overflow": False}},
    {"bf16": _MASTERS}, {"bf16": _MASTERS | {"bf16_optimizer_states": True}},
    {"bf16": _MASTERS, "zero_optimization": {"offload_optimizer": _HOST}},
    {"fp16": {"loss_scale": 128}}, {"fp16": {"initial_scale_power": 4, "hysteresis": 1}},
    {"fp16": {"fp16_master_weights_and_grads": True}, "zero_optimization": {"offload_optimizer": _HOST}},
]  # fmt: skip
SETTINGS = [
    *({"zero_optimization": settings} for settings in _ZERO),
    *({"scheduler": settings} for settings in SCHEDULERS),
    *_TOP,
]


def merged(config: Mapping[str, Any], change: Mapping[str, Any]) -> Config:
    """`config` with `change` laid over it, object by object."""
    result = dict(config)
    for key, value in change.items():
        before = result.get(key)
        result[key] = merged(before, value) if isinstance(value, dict) and isinstance(before, dict) else value
    return result


def _start(stage: int, optimizer: Config, precision: Config) -> Config:
    return merged(BASE, {"zero_optimization": {"stage": stage}, "optimizer": optimizer} | precision)


def sample(count: int, seed: int) -> Iterator[Config]:
    """`count` configs, each with one to three settings; half of them run a rule of this package."""
    source = random.Random(seed)
    for _ in range(count):
        optimizer = source.choice(RULES if source.random() < 0.5 else OPTIMIZERS)
        config = _start(source.randrange(4), optimizer, source.choice(PRECISIONS))
        for change in source.sample(SETTINGS, source.choice((1, 1, 2, 3))):
            config = merged(config, change)
        yield config


def every_pair() -> Iterator[Config]:
    """Every setting at every stage, and every optimizer at every stage in every precision."""
    for stage in range(4):
        for optimizer in (RULES[0], OPTIMIZERS[1]):
            for change in SETTINGS:
                yield merged(_start(stage, optimizer, {}), change)
        for optimizer in RULES + OPTIMIZERS:
            for precision in PRECISIONS:
                yield _start(stage, optimizer, precision)
