"""Every key of a DeepSpeed 0.19 JSON.

DeepSpeed checks the sections that have a pydantic model of its own and reads the rest key by key, ignoring
what it does not know. The types here cover that rest; `deepspeed_models` names DeepSpeed's own for the others.
A test compares them with the keys that DeepSpeed's config reader asks for, so an upgrade that adds one tells.

Source: `deepspeed/runtime/config.py` of DeepSpeed 0.19.8 and the modules it imports.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, create_model, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict


def _no_text(value: Any) -> Any:
    # DeepSpeed computes with these as they are: "4" would fail there, and true would count as 1.
    if isinstance(value, (str, bool)):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


def _switch(value: Any) -> Any:
    # DeepSpeed asks for their truth only, and "false" is true.
    return bool(value) if type(value) is int and value in (0, 1) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _interval(value: Any) -> Any:
    # DeepSpeed takes a remainder. Trainers write infinity for "never".
    if value == 0 and not isinstance(value, bool):
        raise PydanticCustomError("interval", "Input should be a whole number other than 0")
    return None if value == float("inf") else value


Flag = Annotated[bool, BeforeValidator(_switch), Strict()]
Count = Annotated[int, Strict(), Field(gt=0)]
Whole = Annotated[int, BeforeValidator(_no_text)]
Number = Annotated[float, BeforeValidator(_no_text), Field(allow_inf_nan=False)]
CommunicationType = Annotated[Literal["fp16", "bf16", "fp32"], BeforeValidator(_lower)]
DType = Literal[
    "fp32", "float32", "float", "torch.float32", "fp16", "float16", "half", "torch.float16",
    "bf16", "bfloat16", "torch.bfloat16",
]  # fmt: skip

# A JSON object with optional keys and no others.
_section = with_config(ConfigDict(extra="forbid"))


@_section
class Optimizer(TypedDict, total=False):
    type: str | None
    params: dict[str, Any]
    legacy_fusion: Flag


@_section
class Scheduler(TypedDict, total=False):
    type: str | None
    params: dict[str, Any]


@_section
class ActivationCheckpointing(TypedDict, total=False):
    partition_activations: Flag
    number_checkpoints: Count | None
    contiguous_memory_optimization: Flag
    synchronize_checkpoint_boundary: Flag
    profile: Flag
    cpu_checkpointing: Flag


@_section
class AsyncIO(TypedDict, total=False):
    block_size: Whole
    queue_depth: Whole
    intra_op_parallelism: Whole
    single_submit: Flag
    overlap_events: Flag
    use_gds: Flag


@_section
class ModelInfo(TypedDict, total=False):
    profile: Flag
    num_params: Whole | None
    hidden_size: Whole | None
    num_layers: Whole | None


@_section
class Autotuning(TypedDict, total=False):
    enabled: Flag
    fast: Flag
    results_dir: str | None
    exps_dir: str | None
    overwrite: Flag
    start_profile_step: Whole
    end_profile_step: Whole
    metric: Literal["latency", "throughput", "flops", "forward", "step"]
    metric_path: str | None
    tuner_type: Literal["gridsearch", "random", "model_based"]
    tuner_early_stopping: Whole
    tuner_num_trials: Whole
    arg_mappings: dict[str, Any] | None
    model_info: ModelInfo | None
    model_info_path: str | None
    mp_size: Whole
    max_train_batch_size: Whole | None
    min_train_batch_size: Whole
    max_train_micro_batch_size_per_gpu: Whole
    min_train_micro_batch_size_per_gpu: Whole
    num_tuning_micro_batch_sizes: Whole


@_section
class CheckpointWriter(TypedDict, total=False):
    type: str | None
    io_buffer_size: Whole
    io_buffer_double: Flag
    show_statistics: Flag
    data_parallel: str | None
    decoupled: Flag
    io_multiplier: Whole


@_section
class ParallelWrite(TypedDict, total=False):
    pipeline_stage: Flag


@_section
class Checkpoint(TypedDict, total=False):
    tag_validation: str
    load_universal: Flag
    use_node_local_storage: Flag
    parallel_write: ParallelWrite
    checkpoint_serialization: Flag
    writer: CheckpointWriter | None


@_section
class DataTypes(TypedDict, total=False):
    grad_accum_dtype: DType | None
    param_dtype: DType | None
    buffer_dtype: DType | None
    keep_in_fp32_modules: list[str] | None


@_section
class DataSampling(TypedDict, total=False):
    enabled: Flag
    num_epochs: Whole
    num_workers: Whole
    pin_memory: Flag
    curriculum_learning: dict[str, Any]
    dynamic_batching: dict[str, Any]


@_section
class DataRouting(TypedDict, total=False):
    enabled: Flag
    random_ltd: dict[str, Any]


@_section
class DataEfficiency(TypedDict, total=False):
    enabled: Flag
    seed: Whole
    data_sampling: DataSampling
    data_routing: DataRouting


@_section
class FlopsProfiler(TypedDict, total=False):
    enabled: Flag
    recompute_fwd_factor: Number
    profile_step: Whole
    module_depth: Whole
    top_modules: Whole
    detailed: Flag
    output_file: str | None


@_section
class Pipeline(TypedDict, total=False):
    stages: Whole
    partition: str
    seed_layers: Flag
    activation_checkpoint_interval: Whole
    pipe_partitioned: Flag
    grad_partitioned: Flag
    use_reentrant: Flag


@_section
class Timers(TypedDict, total=False):
    throughput: dict[str, Any]


@_section
class TorchAutocast(TypedDict, total=False):
    enabled: Flag
    dtype: DType | None
    lower_precision_safe_modules: list[str] | None


@_section
class DeepSpeedJson(TypedDict, total=False):
    """The top level. Sections typed `dict` have a model inside DeepSpeed (see `deepspeed_models`)."""

    train_batch_size: Count | None
    train_micro_batch_size_per_gpu: Count | None
    gradient_accumulation_steps: Count | None
    managed_gradient_accumulation: Flag
    gradient_clipping: Annotated[Number, Field(ge=0)]
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], BeforeValidator(_lower)]
    gradient_predivide_factor: Annotated[Number, Field(gt=0)]
    prescale_gradients: Flag
    communication_data_type: CommunicationType | None
    seq_parallel_communication_data_type: CommunicationType | None
    disable_allgather: Flag
    disable_python_gc: Flag
    dataloader_drop_last: Flag
    dump_state: Flag
    log_level: str | None
    memory_breakdown: Flag
    steps_per_print: Annotated[Whole | None, BeforeValidator(_interval)]
    vocabulary_size: Whole | None
    wall_clock_breakdown: Flag
    use_data_before_expert_parallelism: Flag
    data_parallel_size: Count
    sequence_parallel_size: Count

    optimizer: Optimizer
    scheduler: Scheduler
    zero_allow_untested_optimizer: Flag
    zero_force_ds_cpu_optimizer: Flag
    # Deprecated: `zero_optimization: true` means stage 1, with `allgather_size` beside it.
    zero_optimization: Any
    allgather_size: Whole | None

    bf16: dict[str, Any]
    bfloat16: dict[str, Any]
    fp16: dict[str, Any]
    torch_autocast: TorchAutocast
    data_types: DataTypes
    weight_quantization: dict[str, Any]

    tensor_parallel: dict[str, Any]
    expert_parallel: dict[str, Any]
    pipeline: Pipeline

    activation_checkpointing: ActivationCheckpointing
    aio: AsyncIO | None
    autotuning: Autotuning
    checkpoint: Checkpoint
    comms_logger: dict[str, Any]
    compile: dict[str, Any]
    data_efficiency: DataEfficiency
    datastates_ckpt: Any
    flops_profiler: FlopsProfiler
    hybrid_engine: dict[str, Any]
    timers: Timers

    comet: dict[str, Any]
    csv_monitor: dict[str, Any]
    tensorboard: dict[str, Any]
    wandb: dict[str, Any]


def deepspeed_models() -> dict[tuple[str, ...], type[BaseModel]]:
    """DeepSpeed's own pydantic model of each section that has one, by the section's path."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    # A dataclass that DeepSpeed fills key by key.
    public = {name: hint for name, hint in get_type_hints(AutoEPConfig).items() if not name.startswith("_")}
    fields: dict[str, Any] = {name: (hint, None) for name, hint in public.items()}
    expert_parallel = create_model("ExpertParallel", __config__=ConfigDict(extra="forbid"), **fields)
    return {
        ("zero_optimization",): DeepSpeedZeroConfig,
        ("bf16",): DeepSpeedBF16Config,
        ("bfloat16",): DeepSpeedBF16Config,
        ("fp16",): DeepSpeedFP16Config,
        ("comet",): CometConfig,
        ("csv_monitor",): CSVConfig,
        ("tensorboard",): TensorBoardConfig,
        ("wandb",): WandbConfig,
        ("comms_logger",): CommsLoggerConfig,
        ("compile",): CompileConfig,
        ("expert_parallel",): expert_parallel,
        ("hybrid_engine",): HybridEngineConfig,
        ("tensor_parallel",): TPTrainingConfig,
        ("timers", "throughput"): DeepSpeedThroughputTimerConfig,
        ("weight_quantization",): WeightQuantConfig,
    }
