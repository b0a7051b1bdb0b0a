"""Settings that exclude each other.

What DeepSpeed finds out only while it builds an engine or makes a step, and what rules of this package cannot be
combined with.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.config.deepspeed import SPELLINGS, DeepSpeedSettings, dtype_name
from toolkit.errors import UserError, nearest
from toolkit.sentences import shown

_OFFLOADS = ("offload_optimizer", "offload_param")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
# DeepSpeed's `is_zero_supported_optimizer`, by `optimizer.type`.
_TESTED_WITH_ZERO = ("adam", "adamw", "adagrad", "lion", "muon")


@dataclass(frozen=True)
class Facts:
    """What a config says, as DeepSpeed reads it.

    Attributes:
        config: the JSON, without "auto".
        models: its sections that DeepSpeed has models for, by dotted path.
        ds: the JSON as all others read it.
    """

    config: Mapping[str, Any]
    models: Mapping[str, Any]
    ds: DeepSpeedSettings

    @property
    def zero(self) -> Any:
        """DeepSpeed's model of `zero_optimization`; all defaults for the deprecated `zero_optimization: true`."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        return self.models.get("zero_optimization") or DeepSpeedZeroConfig()

    def enabled(self, section: str) -> bool:
        return bool(getattr(self.models.get(section), "enabled", False))


def check_limits(facts: Facts) -> None:
    """Raises UserError for the first pair of settings that cannot be used together."""
    for check in _CHECKS:
        for problem in check(facts):
            raise UserError(problem)


def _precision(facts: Facts) -> Iterator[str]:
    bf16 = next((key for key in ("bf16", "bfloat16") if facts.enabled(key)), None)
    if bf16 and facts.enabled("fp16"):
        yield f"{bf16}.enabled and fp16.enabled are both true; a run computes in one of them."


def _dtypes(facts: Facts) -> Iterator[str]:
    ds = facts.ds
    types, computed = facts.config.get("data_types", {}), ds.computed
    if types.get("param_dtype") not in (None, *SPELLINGS[computed]):
        given = shown(types["param_dtype"])
        yield f"data_types.param_dtype is {given}, but the run computes in {computed}; leave it out."
    gradients = types.get("grad_accum_dtype")
    if ds.stage == 0 and gradients not in (None, *SPELLINGS[computed]):
        yield (
            f"data_types.grad_accum_dtype is {shown(gradients)}, but without ZeRO gradients are in {computed} like the "
            "model; leave it out, or use zero_optimization.stage 1, 2 or 3."
        )
    if _wraps_bf16(facts) and ds.rule:
        yield (
            f"data_types.grad_accum_dtype {gradients!r} with bf16 at zero_optimization.stage 1 makes DeepSpeed "
            "use a wrapper whose fp32 gradients are not sharded and whose partitions are not whole blocks, "
            f"which {ds.optimizer} needs; remove it, or use stage 2 or 3."
        )


def _wraps_bf16(facts: Facts) -> bool:
    """Whether DeepSpeed uses its BF16_Optimizer."""
    ds = facts.ds
    return ds.computed == "bf16" and ds.stage == 1 and ds.gradients == "fp32" and ds.offload_optimizer == "none"


def _offload(facts: Facts) -> Iterator[str]:
    ds = facts.ds
    for part in _OFFLOADS:
        device = getattr(ds, part)
        if device == "none":
            continue
        needed = 3 if part == "offload_param" else 1
        if ds.stage < needed:
            allowed = "3" if needed == 3 else "1, 2 or 3"
            yield (
                f"zero_optimization.{part} (device {device!r}) needs zero_optimization.stage {allowed}, "
                f"and it is {ds.stage}."
            )
        if device == "nvme" and getattr(facts.zero, part).nvme_path is None:
            yield f"zero_optimization.{part}.device 'nvme' needs nvme_path beside it."
    section = facts.zero.offload_optimizer
    if section is None or ds.optimizer is None:
        return
    if section.ratio < 1.0 and not ds.on_cpu_adam and ds.offload_optimizer != "none":
        yield (
            f"zero_optimization.offload_optimizer.ratio is {section.ratio:g}, and only DeepSpeed's Adam and AdamW can "
            f"leave a part of the step on the device, not {ds.optimizer}; leave it out."
        )


def _zero(facts: Facts) -> Iterator[str]:
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    ds, zero, stage = facts.ds, facts.zero, facts.ds.stage
    if zero.legacy_stage1 and stage:
        yield "zero_optimization.legacy_stage1 is no longer part of DeepSpeed; leave it out."
    if stage in (1, 2) and zero.allgather_bucket_size % 2:
        yield (
            f"zero_optimization.allgather_bucket_size is {zero.allgather_bucket_size}, but must be even at stages 1 "
            "and 2."
        )
    if not zero.compute_grad_norm:
        clipping = facts.config.get("gradient_clipping", GRADIENT_CLIPPING_DEFAULT)
        for setting, given in (
            (f"gradient_clipping {clipping:g} (1 unless it is set)", clipping > 0),
            ("zero_optimization.offload_optimizer", ds.offload_optimizer != "none"),
            ("zero_optimization.zenflow", zero.zenflow is not None),
            ("data_types.grad_accum_dtype 'fp32' with bf16 at stage 1", _wraps_bf16(facts)),
        ):
            if given:
                yield f"zero_optimization.compute_grad_norm is false, and {setting} needs the norm; change one."
    if facts.config.get("managed_gradient_accumulation") is False:
        if zero.overlap_comm and stage < 2:
            yield "managed_gradient_accumulation is false, which allows overlap_comm at stages 2 and 3 only."
        if facts.models["compile"].deepcompile:
            yield "managed_gradient_accumulation is false, which compile.deepcompile does not allow."


def _optimizer(facts: Facts) -> Iterator[str]:
    ds, kind = facts.ds, facts.ds.foreign
    if kind and ds.stage and kind not in _TESTED_WITH_ZERO and not facts.config.get("zero_allow_untested_optimizer"):
        yield (
            f"optimizer.type {ds.optimizer!r} is one that DeepSpeed has not tested with ZeRO; set "
            "zero_allow_untested_optimizer to true to use it."
        )
    if kind == "lamb" and not (ds.computed == "fp16" and facts.models["fp16"].loss_scale == 0):
        yield "optimizer.type 'Lamb' needs fp16.enabled with a dynamic loss scale (fp16.loss_scale 0)."
    if (
        kind in ("adam", "adamw")
        and facts.config.get("optimizer", {}).get("legacy_fusion")
        and not ds.params.get("torch_adam")
        and ds.stage == 0
        and ds.computed != "fp32"
    ):
        yield f"optimizer.legacy_fusion is true, which DeepSpeed's {ds.optimizer} no longer supports; leave it out."
    if kind == "muon" and ds.stage == 3 and facts.zero.reduce_scatter:
        yield (
            "optimizer.type 'Muon' at zero_optimization.stage 3 needs reduce_scatter false, with which gradients are "
            "not cut into whole blocks here; use stage 1 or 2."
        )


def _scaling(facts: Facts) -> Iterator[str]:
    """Rules take the mean whatever these say (`toolkit.zero.gradients.takes_mean`)."""
    ds = facts.ds
    scales = facts.config.get("gradient_allreduce_op", "mean").lower() == "mean" or ds.stage == 3
    if ds.rule or ds.stage < 2 or not facts.zero.reduce_scatter or not scales:
        return
    if facts.config.get("prescale_gradients"):
        name = "prescale_gradients"
    elif facts.config.get("gradient_predivide_factor", 1.0) != 1.0:
        name = "gradient_predivide_factor"
    else:
        return
    yield (
        f"{name} is set, and DeepSpeed does not have it at zero_optimization.stage {ds.stage} with reduce_scatter; "
        "leave it out: the mean over ranks is the same."
    )


def _master_weights(facts: Facts) -> Iterator[str]:
    ds = facts.ds
    for key, dtype in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        section = facts.models.get(key)
        if not getattr(section, f"{dtype}_master_weights_and_grads", False):
            continue
        place = f"{key}.{dtype}_master_weights_and_grads"
        if ds.rule:
            yield (
                f"{place} takes the bits below {dtype} away from {ds.optimizer}; leave it out: "
                "optimizer.params.weights decides whether there are master weights."
            )
        if (
            ds.offload_optimizer != "none" or not getattr(section, "bf16_optimizer_states", False)
        ) and not ds.on_cpu_adam:
            yield f"{place} needs zero_optimization.offload_optimizer and DeepSpeed's Adam or AdamW."


def _other(facts: Facts) -> Iterator[str]:
    ds = facts.ds
    level = facts.config.get("log_level")
    if level is not None and level.lower() not in _LOG_LEVELS:
        yield f"log_level is {shown(level)}, but must be one of {', '.join(_LOG_LEVELS)}.{nearest(level, _LOG_LEVELS)}"
    size = facts.config.get("tensor_parallel", {}).get("autotp_size", 0)
    if type(size) is not int:  # DeepSpeed's model of the section takes text too, and its engine does not
        yield f"tensor_parallel.autotp_size is {shown(size)}, but must be a whole number."
    autocast = facts.config.get("torch_autocast", {})
    if autocast.get("enabled"):
        if ds.rule and ds.stage and autocast.get("dtype") in SPELLINGS["fp16"]:
            yield (
                f"torch_autocast.dtype 'fp16' scales the loss in a way that the step of {ds.optimizer} under ZeRO "
                "does not know; use 'bf16', or fp16.enabled."
            )
        if ds.computed == "fp16" and not ds.stage:
            yield (
                "torch_autocast.enabled and fp16.enabled at stage 0 scale the loss twice; use one of them, or a stage "
                "of zero_optimization."
            )
        elif ds.computed == "fp16" and autocast.get("dtype") is None:
            # A device's default, which is bf16 on a CPU.
            yield "torch_autocast.dtype is not given, but the model is in fp16; give 'fp16', or leave autocast out."
        given = dtype_name(autocast.get("dtype")) or "fp32"
        if ds.computed != "fp32" and given not in ("fp32", ds.computed):
            yield f"torch_autocast.dtype is {shown(autocast['dtype'])}, but the model is in {ds.computed}; use one."
        for name in autocast.get("lower_precision_safe_modules") or ():
            if not _importable(name):
                yield f"torch_autocast.lower_precision_safe_modules names {name!r}, which cannot be imported."
    if ds.rule and facts.models["compile"].deepcompile:
        yield (
            f"compile.deepcompile compiles DeepSpeed's own handling of gradients into the model, which "
            f"{ds.optimizer} does not use; leave it out."
        )


def _importable(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError):
        return False


def _zenflow(facts: Facts) -> Iterator[str]:
    ds = facts.ds
    flow, place = facts.zero.zenflow, "zero_optimization.zenflow"
    if flow is None or ds.rule or ds.optimizer is None:
        return
    if not ds.on_cpu_adam or not ds.stage:
        yield f"{place} needs zero_optimization.stage 1, 2 or 3, offload_optimizer, and DeepSpeed's Adam or AdamW."
    if "params" not in facts.config["optimizer"]:  # of which DeepSpeed's own optimizer for it takes a mapping
        yield f"{place} needs optimizer.params, if only an empty one ({{}})."
    counted = isinstance(flow.select_interval, int)
    if counted != (flow.select_strategy != "auto"):
        needed = '"auto", like select_strategy' if counted else "a number with this select_strategy"
        yield f"{place}.select_interval is {shown(flow.select_interval)}, but must be {needed}."
    updates = flow.update_interval
    if flow.select_strategy == "step" and isinstance(updates, int) and 0 < flow.select_interval < updates:
        yield f"{place}.select_interval is {flow.select_interval}, but must be at least update_interval, {updates}."
    if flow.offload and not facts.zero.overlap_comm:
        yield f"{place}.offload needs zero_optimization.overlap_comm."


def _experts(facts: Facts) -> Iterator[str]:
    ds = facts.ds
    if ds.rule and facts.models["expert_parallel"].enabled:
        yield (
            f"expert_parallel.enabled needs parameter groups for experts alone, and those of {ds.optimizer} are by "
            "component; leave it out."
        )


_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
_ZERO_PP = (*_QUANTIZED, "zero_quantized_gradients")
"""Parts of ZeRO++ that change numbers; another, zero_hpz_partition_size, keeps them."""


def _zero_plus_plus(facts: Facts) -> Iterator[str]:
    zero, stage = facts.zero, facts.ds.stage
    asked = [name for name in _ZERO_PP if getattr(zero, name)]
    if stage != 3 and zero.zero_hpz_partition_size > 1:
        asked.append("zero_hpz_partition_size")
    for name in asked:
        if stage != 3:
            yield f"zero_optimization.{name} acts at stage 3 alone, and stage is {stage}; leave it out."
    for name in _QUANTIZED:
        if getattr(zero, name):
            yield (
                f"zero_optimization.{name} is not tested with shards of whole blocks, as they are here with every "
                "optimizer; leave it out."
            )


def _whole_blocks(facts: Facts) -> Iterator[str]:
    """What cannot be combined with shards of whole blocks. At stage 3 the layout is the same for every optimizer."""
    ds, zero, kind = facts.ds, facts.zero, facts.ds.optimizer
    if ds.stage == 3 and zero.reduce_scatter is False:
        yield "zero_optimization.reduce_scatter is false, but must be true (the default) at stage 3."
    if ds.stage == 3 and zero.zero_quantized_gradients:
        yield "zero_optimization.zero_quantized_gradients is not supported at stage 3; leave it out."
    if ds.rule and (zero.zenflow is not None or getattr(zero.offload_optimizer, "super_offload", False)):
        yield (
            f"zero_optimization.zenflow and offload_optimizer.super_offload bring an optimizer of their own, which "
            f"cannot run {kind}; leave them out."
        )
    if ds.rule and ds.stage in (1, 2) and zero.round_robin_gradients:
        yield (
            "zero_optimization.round_robin_gradients orders parameters by the number of ranks, which the state of "
            f"{kind} must not depend on; leave it out."
        )


_CHECKS = (
    _precision,
    _dtypes,
    _offload,
    _zero,
    _optimizer,
    _scaling,
    _master_weights,
    _zenflow,
    _experts,
    _other,
    _zero_plus_plus,
    _whole_blocks,
)
