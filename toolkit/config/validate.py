"""Check a whole DeepSpeed JSON before anything is loaded: keys, types, names, impossible combinations."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from toolkit.config.automatic import Shape, settle
from toolkit.config.files import without_auto
from toolkit.config.optimizers import check_combination, check_optimizer, check_scheduler
from toolkit.config.schema import DeepSpeedJson, deepspeed_models
from toolkit.errors import UserError
from toolkit.sentences import dotted, explain, shown

# DeepSpeed's names for a data type (DtypeEnum).
_SPELLINGS = {
    "fp32": ("fp32", "float32", "float", "torch.float32"),
    "fp16": ("fp16", "float16", "half", "torch.float16"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
}
_OFFLOADS = ("offload_optimizer", "offload_param")
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def validate(config: Mapping[str, Any], *, origin: str, world_size: int | None = None) -> None:
    """Check a DeepSpeed JSON whole.

    Args:
        config: the content. "auto", which a trainer fills in, is accepted for any value.
        origin: what the sentence starts with: a file's path, a config's name.
        world_size: the number of ranks. Given, the config must be complete: batch sizes that multiply, and
            every argument that its scheduler needs. Not given, the run may still fill those in.

    Raises UserError with one sentence about the first problem.
    """
    try:
        with _quiet_deepspeed():
            # What has a rule needs nobody to fill it in; any numbers do here.
            config = settle(config, lambda: Shape(0, 0, 0), on_gpu=False, world_size=1)
            complete = world_size is not None and not _has_auto(config)
            _validate(without_auto(config), world_size, complete=complete)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _validate(config: dict[str, Any], world_size: int | None, *, complete: bool) -> None:
    from toolkit.optim import find_rule

    _check_removed(config)
    try:
        TypeAdapter(DeepSpeedJson).validate_python(config)
    except ValidationError as error:
        raise UserError(explain(error, DeepSpeedJson)) from None
    models = _check_sections(config)

    zero = models.get("zero_optimization")
    offloads = {part: getattr(getattr(zero, part, None), "device", "none") for part in _OFFLOADS}
    stage = getattr(zero, "stage", int(config.get("zero_optimization") is True))
    optimizer, scheduler = config.get("optimizer", {}), config.get("scheduler", {})
    kind = optimizer.get("type")
    if kind is not None:
        check_optimizer(kind, optimizer.get("params", {}), offloaded=offloads["offload_optimizer"] != "none")
    if scheduler.get("type") is not None:
        check_scheduler(scheduler["type"], scheduler.get("params", {}), optimizer=kind, complete=complete)
    computed = _check_precision(config, models, stage, kind, offloads)
    _check_offload(zero, stage, offloads)
    _check_whole_blocks(zero, stage, kind)
    if find_rule(kind):
        steps = config.get("gradient_accumulation_steps")
        params, offload = optimizer.get("params", {}), offloads["offload_optimizer"]
        check_combination(kind, params, computed=computed, stage=stage, offload=offload, accumulation=steps)
    _check_batch(config, world_size, complete=complete)
    _check_by_deepspeed(config)


def _check_removed(config: Mapping[str, Any]) -> None:
    from deepspeed.runtime import config as deepspeed_config

    zero = config.get("zero_optimization")
    for prefix, section, table in (
        ("", config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS"),
        ("zero_optimization.", zero if isinstance(zero, Mapping) else {}, "_REMOVED_ZERO_CONFIG_KEYS"),
    ):
        for key, why in getattr(deepspeed_config, table, {}).items():
            if key in section:
                why = why.split(" See http")[0]
                raise UserError(f"{prefix}{key} is no longer part of DeepSpeed: {why}")


def _check_sections(config: Mapping[str, Any]) -> dict[str, BaseModel]:
    """Every section that DeepSpeed has a model for, parsed by it, by dotted path."""
    parsed: dict[str, BaseModel] = {}
    for path, model in deepspeed_models().items():
        section: Any = config
        for key in path:
            section = section.get(key, {})
        if isinstance(section, bool):  # the deprecated `zero_optimization: true`
            continue
        if not isinstance(section, Mapping):
            raise UserError(f"{dotted(path)} is {shown(section)}, but must be an object with keys.")
        try:
            parsed[dotted(path)] = model(**section)
        except ValidationError as error:
            raise UserError(explain(error, model, path)) from None
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"{dotted(path)}: {_one_line(error)}") from None
    return parsed


def _check_precision(
    config: Mapping[str, Any], models: Mapping[str, Any], stage: int, kind: str | None, offloads: Mapping[str, str]
) -> str:
    """What the model computes in."""
    from toolkit.optim import find_rule

    bf16 = next((key for key in ("bf16", "bfloat16") if getattr(models.get(key), "enabled", False)), None)
    if bf16 and getattr(models.get("fp16"), "enabled", False):
        raise UserError(f"{bf16}.enabled and fp16.enabled are both true; a run computes in one of them.")
    computed = "bf16" if bf16 else "fp16" if getattr(models.get("fp16"), "enabled", False) else "fp32"
    types = config.get("data_types", {})
    if types.get("param_dtype") not in (None, *_SPELLINGS[computed]):
        given = shown(types["param_dtype"])
        raise UserError(f"data_types.param_dtype is {given}, but the run computes in {computed}; leave it out.")
    gradients = types.get("grad_accum_dtype")
    if stage == 0 and gradients not in (None, *_SPELLINGS[computed]):
        raise UserError(
            f"data_types.grad_accum_dtype is {shown(gradients)}, but without ZeRO gradients are in {computed} like the "
            "model; leave it out, or use zero_optimization.stage 1, 2 or 3."
        )
    in_fp32 = gradients in _SPELLINGS["fp32"]
    if find_rule(kind) and bf16 and stage == 1 and in_fp32 and offloads["offload_optimizer"] == "none":
        raise UserError(
            f"data_types.grad_accum_dtype {gradients!r} with bf16 at zero_optimization.stage 1 makes DeepSpeed "
            "use a wrapper whose fp32 gradients are not sharded and whose partitions are not whole blocks, "
            f"which {kind} needs; remove it, or use stage 2 or 3."
        )
    return computed


def _check_whole_blocks(zero: Any, stage: int, kind: str | None) -> None:
    """What cannot be combined with shards of whole blocks."""
    from toolkit.optim import find_rule

    if zero is None:  # the deprecated `zero_optimization: true` sets none of them
        return
    # At stage 3 the layout is the same for every optimizer.
    if stage == 3 and zero.reduce_scatter is False:
        raise UserError("zero_optimization.reduce_scatter is false, but must be true (the default) at stage 3.")
    if stage == 3 and zero.zero_quantized_gradients:
        raise UserError("zero_optimization.zero_quantized_gradients is not supported at stage 3; leave it out.")
    if find_rule(kind) and (zero.zenflow is not None or getattr(zero.offload_optimizer, "super_offload", False)):
        raise UserError(
            f"zero_optimization.zenflow and offload_optimizer.super_offload bring an optimizer of their own, which "
            f"cannot run {kind}; leave them out."
        )
    if find_rule(kind) and stage in (1, 2) and zero.round_robin_gradients:
        raise UserError(
            "zero_optimization.round_robin_gradients orders parameters by the number of ranks, which the state of "
            f"{kind} must not depend on; leave it out."
        )


def _check_offload(zero: Any, stage: int, offloads: Mapping[str, str]) -> None:
    for part, device in offloads.items():
        if device == "none":
            continue
        needed = 3 if part == "offload_param" else 1
        if stage < needed:
            allowed = "3" if needed == 3 else "1, 2 or 3"
            raise UserError(
                f"zero_optimization.{part} (device {device!r}) needs zero_optimization.stage {allowed}, "
                f"and it is {stage}."
            )
        if device == "nvme" and getattr(zero, part).nvme_path is None:
            raise UserError(f"zero_optimization.{part}.device 'nvme' needs nvme_path beside it.")


def _check_batch(config: Mapping[str, Any], world_size: int | None, *, complete: bool) -> None:
    total, micro, steps = (config.get(key) for key in _BATCH_KEYS)
    if complete and total is None and micro is None:
        raise UserError("train_batch_size and train_micro_batch_size_per_gpu are both missing; give one of them.")
    if total is None:
        return
    # Ranks that share a sequence or a layer work on the same micro-batch.
    sharing = config.get("sequence_parallel_size", 1)
    sharing *= max(config.get("tensor_parallel", {}).get("autotp_size", 1), 1)
    replicas = None if world_size is None else world_size // sharing
    known = {_BATCH_KEYS[1]: micro, _BATCH_KEYS[2]: steps, "world size": replicas}
    factors = {name: factor for name, factor in known.items() if factor is not None}
    product = 1
    for factor in factors.values():
        product *= factor
    if total % product == 0 and (len(factors) < len(known) or total == product):
        return
    relation = "is not" if len(factors) == len(known) else "is not a multiple of"
    terms = " * ".join(f"{factor} ({name})" for name, factor in factors.items())
    raise UserError(f"train_batch_size {total} {relation} {terms} = {product}.")


def _check_by_deepspeed(config: Mapping[str, Any]) -> None:
    """Last, whatever else DeepSpeed's own config reader refuses, with the batch sizes set aside."""
    from deepspeed.runtime.config import DeepSpeedConfig

    trial = {key: value for key, value in copy.deepcopy(dict(config)).items() if key not in _BATCH_KEYS}
    try:
        DeepSpeedConfig({**trial, "train_micro_batch_size_per_gpu": 1})
    except Exception as error:
        raise UserError(f"DeepSpeed refuses this config: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _has_auto(config: Mapping[str, Any]) -> bool:
    return any(value == "auto" or (isinstance(value, Mapping) and _has_auto(value)) for value in config.values())


@contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Its remarks on a config belong to the run itself, where they come once more."""
    logger = logging.getLogger("DeepSpeed")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
