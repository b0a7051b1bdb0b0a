"""What a config asks of the machine and of the number of ranks that are to run it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.config.limits import Facts
from toolkit.errors import UserError, but
from toolkit.sentences import one_line

# What a section imports where it is enabled.
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


UNSUMMED = (
    "sequence_parallel_size is {size}: DeepSpeed does not add up the gradients of ranks that share a sequence "
    "(Ulysses) unless initialize is handed an mpu; leave it out, call initialize_sequence_parallel({size}) of "
    "deepspeed.runtime.sequence_parallel.parallel_state_sp, and hand that module over as `mpu`."
)
"""Of sequence parallelism by the JSON or by `mesh_param`: gradients are added up over the other dimension alone."""


def ranks_per_replica(facts: Facts) -> int:
    """Ranks that share a sequence or a layer: they work on the same micro-batch."""
    sharing: int = facts.config.get("sequence_parallel_size", 1)
    return sharing * max(facts.models["tensor_parallel"].autotp_size, 1)


def check_mesh(facts: Facts, world_size: int) -> None:
    """Raises UserError unless `world_size` ranks can be cut the way that the config says."""
    experts = facts.models["expert_parallel"]
    for place, size in (
        ("sequence_parallel_size", facts.config.get("sequence_parallel_size", 1)),
        ("tensor_parallel.autotp_size", facts.models["tensor_parallel"].autotp_size),
        ("sequence_parallel_size * tensor_parallel.autotp_size", ranks_per_replica(facts)),
        ("expert_parallel.autoep_size", (experts.enabled and experts.autoep_size) or 1),
        ("zero_optimization.zero_hpz_partition_size", facts.zero.zero_hpz_partition_size if facts.ds.stage == 3 else 1),
    ):
        if size > 1 and world_size % size:
            raise UserError(f"{place} is {size}, which does not divide the number of ranks, {world_size}.")
    _check_experts(facts, world_size)
    replicas, sequence = facts.config.get("data_parallel_size"), facts.config.get("sequence_parallel_size")
    own_pass = "autosp" in (facts.models["compile"].passes or ())
    if sequence is not None and sequence > 1 and not own_pass:
        raise UserError(UNSUMMED.format(size=sequence))
    if replicas is not None and sequence is not None and replicas * sequence != world_size:
        raise UserError(
            f"data_parallel_size {replicas} * sequence_parallel_size {sequence} is {replicas * sequence}, but must be "
            f"the number of ranks, {world_size}."
        )


def _check_experts(facts: Facts, world_size: int) -> None:
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config, validate_autoep_config

    ds, tensor = facts.ds, facts.models["tensor_parallel"]
    try:
        validate_autoep_config(
            parse_autoep_config(dict(facts.config.get("expert_parallel", {}))),
            world_size,
            1,
            max(tensor.autotp_size, 1),
            facts.config.get("sequence_parallel_size", 1),
            zero_stage=ds.stage,
            deepcompile_enabled=facts.models["compile"].deepcompile,
            tp_preset_model=tensor.preset_model,
            use_data_before_expert_parallel=facts.config.get("use_data_before_expert_parallelism", False),
            zero_offload_optimizer=ds.offload_optimizer != "none",
            zero_offload_param=ds.offload_param != "none",
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"expert_parallel: {one_line(error)}") from None


def check_machine(facts: Facts) -> None:
    """Raises UserError for the first thing that this machine lacks."""
    for problem in (*_precision(facts), *_launcher(facts), *_extensions(facts), *_packages(facts), *_folders(facts)):
        raise UserError(problem)


def _device() -> Any:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def _precision(facts: Facts) -> Iterator[str]:
    ds, device = facts.ds, _device()
    supported = {"bf16": device.is_bf16_supported, "fp16": device.is_fp16_supported}.get(ds.computed)
    if supported is not None and not supported():
        yield f"{ds.computed} is enabled, but DeepSpeed does not support it on this device ({device.device_name()})."

    if facts.models["fp16"].auto_cast and ds.computed != "fp16":
        yield f"fp16.auto_cast casts inputs to fp16, but the model is in {ds.computed}; leave it out."


def _launcher(facts: Facts) -> Iterator[str]:
    writer = facts.config.get("checkpoint", {}).get("writer")
    missing = [name for name in ("CROSS_RANK", "CROSS_SIZE") if name not in os.environ]
    if writer is not None and missing:
        yield f"checkpoint.writer needs {', '.join(missing)} in the environment; start with DeepSpeed's launcher."


def _extensions(facts: Facts) -> Iterator[str]:
    """Code that DeepSpeed compiles for a device, and has for some devices only."""
    ds = facts.ds
    kind, offloaded, zero = ds.foreign, ds.offload_optimizer != "none", facts.zero
    # Where no optimizer is named, one is handed over, which may be a rule's.
    swaps = ds.offload_optimizer == "nvme" and ds.optimizer is not None and not ds.rule
    nvme = swaps or ds.offload_param == "nvme"
    for place, builder, wanted in (
        ("optimizer.type 'Lamb'", "FusedLambBuilder", kind == "lamb"),
        ("optimizer.type 'Lion'", "CPULionBuilder" if offloaded else "FusedLionBuilder", kind == "lion"),
        ("zero_optimization offload to 'nvme'", "AsyncIOBuilder", nvme),
        ("hybrid_engine.enabled", "InferenceBuilder", facts.enabled("hybrid_engine")),
        ("compile.deepcompile", "DeepCompileBuilder", facts.models["compile"].deepcompile),
    ):
        if wanted and not _has_extension(builder):
            device = _device().device_name()
            yield f"{place} needs an extension of DeepSpeed ({builder}) that this machine ({device}) lacks."

    for place, wanted in (
        ("offload_optimizer.super_offload", getattr(zero.offload_optimizer, "super_offload", False)),
        ("zenflow at stage 3", zero.zenflow is not None),
    ):
        if wanted and ds.stage == 3 and _device().device_name() != "cuda":
            yield f"zero_optimization.{place} needs a CUDA device, not {_device().device_name()}."


def _folders(facts: Facts) -> Iterator[str]:
    if facts.ds.rule and facts.ds.offload_optimizer == "nvme":
        from toolkit.state.files import problem_of

        folder = Path(facts.zero.offload_optimizer.nvme_path)
        if problem := problem_of(folder):
            yield f"zero_optimization.offload_optimizer.nvme_path is {str(folder)!r}, {but(problem)}"


def _has_extension(builder: str) -> bool:
    found = _device().create_op_builder(builder)
    if found is None or type(found).__name__ == "NotImplementedBuilder":
        return False
    return bool(found.is_compatible(verbose=False))


def _packages(facts: Facts) -> Iterator[str]:
    wanted = {section: package for section, package in _PACKAGES.items() if facts.enabled(section)}
    if facts.config.get("datastates_ckpt", False) is not False:
        wanted["datastates_ckpt"] = "datastates"
    for section, package in wanted.items():
        if importlib.util.find_spec(package) is None:
            yield f"{section} needs the package {package}, which is not installed; install it or leave it out."
