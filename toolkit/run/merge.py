"""Flags written into the DeepSpeed JSON, so that the JSON alone describes what DeepSpeed will do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeGuard

from toolkit.config.batch import ACCUMULATION, GLOBAL, JSON_KEYS, MICRO, Batch, Kept, resolve_batch
from toolkit.config.deepspeed import current
from toolkit.config.files import without_auto
from toolkit.config.schedulers import LENGTHS
from toolkit.errors import UserError
from toolkit.records.sizes import counted
from toolkit.run.settings import RunSettings
from toolkit.sentences import value_at

# Which key of a DeepSpeed scheduler holds the peak learning rate, the warm-up and the length of the run.
# WarmupCosineLR and most schedulers of torch take their peak from the optimizer.
PEAK_KEY = {
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
    "OneCycle": "cycle_max_lr",
    "OneCycleLR": "max_lr",
    "CyclicLR": "max_lr",
}
WITH_WARMUP = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
WITH_LENGTH = ("WarmupDecayLR", "WarmupCosineLR")
DEFAULT_WARMUP = 0.1
TORCH_DEFAULT_LENGTH = 5  # `total_iters` of torch's schedulers


def merge_flags(
    config: Mapping[str, Any], settings: RunSettings, world_size: int, kept: Kept | None = None
) -> tuple[dict[str, Any], Batch, list[str]]:
    """The JSON with the run's flags in it, the batch, and remarks for the user.

    Writes a consistent batch triple, `--lr` to the optimizer and to the scheduler's peak, `--steps` to the
    length of DeepSpeed's schedulers and the warm-up to the scheduler. A scheduler of torch keeps a length that the JSON
    gives; a remark says so where it is not that of the run. Without `--warmup` the JSON's own share of the run
    is kept (`warmup_num_steps / total_num_steps`, 10 % where it says neither). "auto" values that no flag
    filled are dropped, which leaves DeepSpeed's and the optimizer's defaults. `kept`: as for `resolve_batch`.

    Raises:
        UserError: a flag contradicts the JSON or has nowhere to go.
    """
    merged = current(copy.deepcopy(dict(config)))
    flags = batch_flags(settings, merged)
    batch = resolve_batch(flags, merged, world_size, kept)
    said = _lowered(flags, merged, batch, kept) + _passed_over(flags, merged, batch, kept)
    triple = {MICRO: batch.micro, ACCUMULATION: batch.accumulation, GLOBAL: batch.total}
    merged.update({JSON_KEYS[name]: value for name, value in triple.items()})

    _check_loop(merged, batch)
    optimizer = merged.get("optimizer")
    if not isinstance(optimizer, dict):
        raise UserError("the DeepSpeed JSON has no 'optimizer' section; it must name the optimizer to train with.")
    scheduler = merged.get("scheduler")
    if settings.rate is not None:
        optimizer.setdefault("params", {})["lr"] = settings.rate
    if isinstance(scheduler, dict):
        peak = PEAK_KEY.get(str(scheduler.get("type")))
        if peak and scheduler.setdefault("params", {}).get(peak) == "auto":
            scheduler["params"][peak] = optimizer.get("params", {}).get("lr", "auto")
        remarks = _merge_scheduler(scheduler, settings)
    elif settings.warmup is not None:
        raise UserError("--warmup needs a 'scheduler' section in the DeepSpeed JSON, and this one has none.")
    else:
        remarks = []
    return without_auto(merged), batch, said + remarks


def batch_flags(settings: RunSettings, config: Mapping[str, Any]) -> dict[str, int | None]:
    """The parts of the batch that the command line gives, by flags or by `--set`; None where it does not."""
    flags = {MICRO: settings.micro_batch, ACCUMULATION: settings.grad_accum, GLOBAL: settings.global_batch}
    for name, key in JSON_KEYS.items():
        if flags[name] is None and key in settings.overridden() and config.get(key) != "auto":
            flags[name] = config.get(key)
    return flags


def _lowered(flags: Mapping[str, int | None], config: Mapping[str, Any], batch: Batch, kept: Kept | None) -> list[str]:
    """A remark where the JSON's micro-batch had to give way to the global batch."""
    stated = config.get(JSON_KEYS[MICRO])
    if kept is not None and kept.micro == batch.micro:
        return []
    if flags[MICRO] is not None or stated is None or not _number(stated) or batch.micro >= stated:
        return []
    divide = "divides" if batch.total == 1 else "divide"
    return [
        f"the micro-batch is {batch.micro}, not the {stated} of the DeepSpeed JSON, so that "
        f"{counted(batch.total, 'sequence')} a step {divide} among {counted(batch.world_size, 'rank')}."
    ]


def _passed_over(
    flags: Mapping[str, int | None], config: Mapping[str, Any], batch: Batch, kept: Kept | None
) -> list[str]:
    """A remark where the JSON fixes another global batch than the run that is resumed."""
    stated = config.get(JSON_KEYS[GLOBAL])
    if kept is None or flags[GLOBAL] is not None or not _number(stated) or stated == batch.total:
        return []
    return [
        f"{JSON_KEYS[GLOBAL]} {stated} of the DeepSpeed JSON is not used: the run that is resumed has {batch.total} "
        f"sequences a step; --global-batch {stated} changes that."
    ]


def _check_loop(config: Mapping[str, Any], batch: Batch) -> None:
    """Refuse what DeepSpeed leaves to a training loop and this one does not do."""
    for place, name in (("sequence_parallel_size", " (Ulysses)"), ("tensor_parallel.autotp_size", "")):
        value = value_at(config, place)
        if isinstance(value, int | float) and value > 1:
            raise UserError(
                f"{place} is {value}{name}, for which ranks must be given the same sequences, and here each is "
                "given its own; leave it out, or train in a loop of your own with toolkit.initialize."
            )
    if config.get("managed_gradient_accumulation") is False and batch.accumulation > 1:
        raise UserError(
            "managed_gradient_accumulation is false, with which every micro-batch would be a step of its own; leave it "
            "out, or set --grad-accum to 1."
        )
    if value_at(config, "autotuning.enabled") is True:
        raise UserError(
            "autotuning.enabled ends a run after a few steps, for `deepspeed --autotuning` to measure; leave it out."
        )


def _merge_scheduler(scheduler: dict[str, Any], settings: RunSettings) -> list[str]:
    kind = str(scheduler.get("type"))
    params = scheduler.setdefault("params", {})
    if settings.rate is not None and kind in PEAK_KEY:
        params[PEAK_KEY[kind]] = settings.rate
    if kind not in WITH_WARMUP:
        if settings.warmup is not None:
            raise UserError(f"--warmup does not apply to scheduler {kind!r}; it applies to {', '.join(WITH_WARMUP)}.")
        return _settle_length(kind, params, settings.steps)
    # A value of the wrong type is left for the validation of the whole JSON to name.
    warmup, length = params.get("warmup_num_steps"), params.get("total_num_steps")
    if settings.warmup is not None:
        steps = settings.warmup * settings.steps if settings.warmup < 1 else settings.warmup
    elif warmup in (None, "auto"):
        steps = DEFAULT_WARMUP * settings.steps
    elif kind in WITH_LENGTH and _number(length) and _number(warmup) and length > 0:
        steps = warmup / length * settings.steps
    else:
        steps = warmup
    # DeepSpeed refuses a warm-up of 0 steps.
    params["warmup_num_steps"] = max(1, round(steps)) if _number(steps) and steps >= 0 else steps
    if kind in WITH_LENGTH:
        params["total_num_steps"] = settings.steps
    warmup = params["warmup_num_steps"]
    if _number(warmup) and warmup >= settings.steps:
        return [
            f"the warm-up takes {counted(warmup, 'step')} and the run {settings.steps}: "
            "the learning rate never gets past the warm-up."
        ]
    return []


def _settle_length(kind: str, params: dict[str, Any], steps: int) -> list[str]:
    """Let a schedule of torch that leaves its length open take the run's, and say where the two differ."""
    if kind not in LENGTHS:
        return []
    key, afterwards = LENGTHS[kind]
    length, epochs, per_epoch = params.get(key), params.get("epochs"), params.get("steps_per_epoch")
    if kind == "OneCycleLR" and length is None and _number(epochs) and _number(per_epoch):
        length = epochs * per_epoch
    elif length == "auto" or (length is None and kind in ("CosineAnnealingLR", "OneCycleLR")):
        params[key] = length = steps
    elif key not in params:
        length = TORCH_DEFAULT_LENGTH
    if not _number(length) or length == steps:  # a wrong type is left for the validation of the whole JSON to name
        return []
    takes = f"the schedule of {kind} takes {counted(length, 'step')}"
    what, run = f"scheduler.params.{key} is {length}" if params.get(key) else takes, counted(steps, "step")
    if length > steps:
        return [f"{what} and the run takes {run}: it ends before the schedule does."]
    if kind == "OneCycleLR":
        raise UserError(f"{what}, and {kind} cannot continue after that; the run takes {run} (--steps).")
    return [f"{what} and the run takes {run}: from step {length + 1} on {afterwards}."]


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
