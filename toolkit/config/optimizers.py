"""Checks of `optimizer` and `scheduler`: names that DeepSpeed would find, arguments that their classes take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from toolkit.errors import UserError, nearest
from toolkit.sentences import shown, unknown_key

_PLACE = ["optimizer", "params"]
_SCHEDULE = ["scheduler", "params"]
# Read by DeepSpeed itself before it calls the class.
_ADAM_SWITCHES = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}


def check_optimizer(kind: str, params: Mapping[str, Any], *, offloaded: bool) -> None:
    """Check `optimizer.type` and `optimizer.params`; `offloaded` says whether the step runs on the host.

    Raises UserError.
    """
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    from toolkit.optim import RULES, check_settings, find_rule

    in_torch = _torch_names("torch.optim", "Optimizer")
    if find_rule(kind):
        try:
            check_settings(kind, dict(params))
        except ValueError as error:
            raise UserError(f"optimizer.params: {error}") from None
        return
    if kind.lower() not in DEEPSPEED_OPTIMIZERS and kind not in in_torch:
        # Of spellings that differ in case only, the last is offered.
        hint = nearest(kind, [*DEEPSPEED_OPTIMIZERS, *in_torch, *RULES])
        raise UserError(
            f"optimizer.type {kind!r} is unknown; it names one of {', '.join(RULES)}, an optimizer of "
            f"DeepSpeed ({', '.join(DEEPSPEED_OPTIMIZERS)}) or a class of torch.optim.{hint}"
        )
    if "max_grad_norm" in params:
        raise UserError("DeepSpeed refuses optimizer.params.max_grad_norm; set gradient_clipping instead.")
    if accepted := _accepted(kind, params, offloaded):
        for name in params:
            if name not in accepted:
                raise UserError(unknown_key([*_PLACE, name], accepted, "hyper-parameter"))
    _check_common(params)


def check_combination(
    kind: str,
    params: Mapping[str, Any],
    *,
    computed: str,
    stage: int,
    offload: str,
    accumulation: int | None,
) -> None:
    """Check what a rule of this package cannot be combined with.

    Args:
        kind, params: `optimizer.type`, a rule's, and `optimizer.params`.
        computed: "bf16", "fp16" or "fp32", what the model computes in.
        stage: of ZeRO.
        offload: device of `offload_optimizer`, "none" without.
        accumulation: micro-batches per step, None where that is not known yet.

    Raises UserError.
    """
    weights, place = params.get("weights"), "optimizer.params.weights"
    if offload == "nvme":
        raise UserError(
            f"zero_optimization.offload_optimizer.device 'nvme' swaps states of the size and type of fp32 weights, and "
            f"{kind} keeps others; use 'cpu'."
        )
    if weights not in (None, "auto", "fp32"):
        if computed != "bf16":
            raise UserError(
                f"{place} {weights!r} keeps the lower bits of bf16 weights, but the run computes in {computed}; enable "
                "bf16, or set it to 'fp32'."
            )
        if stage == 0:
            raise UserError(
                f"{place} {weights!r} needs zero_optimization.stage 1, 2 or 3: without ZeRO, DeepSpeed hands fp32 "
                "master weights to the optimizer; set it to 'fp32', or a stage (one rank will do)."
            )
    if params.get("release_gradients") is True:
        place = "optimizer.params.release_gradients"
        if stage not in (1, 2):
            raise UserError(f"{place} works at zero_optimization.stage 1 and 2, and it is {stage}.")
        if offload != "none":
            raise UserError(
                f"{place} updates weights on the device, and zero_optimization.offload_optimizer moves that to the "
                "host; use one of them."
            )
        if computed == "fp16":
            raise UserError(f"{place} cannot skip a whole step, as fp16 must for one gradient out of range; use bf16.")
        if accumulation is not None and accumulation > 1:
            raise UserError(
                f"{place} frees each gradient during the backward pass, and gradient_accumulation_steps is "
                f"{accumulation}, which sums them over several; set that to 1."
            )


def _accepted(kind: str, params: Mapping[str, Any], offloaded: bool) -> set[str]:
    """Names that DeepSpeed passes on for this optimizer; empty where only an optional package could tell."""
    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    own: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "adam": (FusedAdam, DeepSpeedCPUAdam),
        "adamw": (FusedAdam, DeepSpeedCPUAdam),
        "adagrad": (torch.optim.Adagrad, DeepSpeedCPUAdagrad),
        "lamb": (FusedLamb, FusedLamb),
        "lion": (FusedLion, DeepSpeedCPULion),
    }
    name = kind.lower()
    if name in own:
        adam = name in ("adam", "adamw")
        target = torch.optim.AdamW if adam and params.get("torch_adam") else own[name][offloaded]
        # `adamw_mode` is DeepSpeedCPUAdam's spelling, which DeepSpeed fills in from `adam_w_mode`.
        return set(_arguments(target)) - {"adamw_mode"} | (_ADAM_SWITCHES if adam else set())
    if name in DEEPSPEED_OPTIMIZERS:
        return set()
    return set(_arguments(getattr(torch.optim, kind)))


def _arguments(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What `target` takes beside its first argument, the parameters or the optimizer."""
    return dict(list(inspect.signature(target).parameters.items())[1:])


def _check_common(params: Mapping[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "momentum"):
        value = params.get(name)
        # Some classes of torch.optim take a pair, or null, here.
        if not (value is None or isinstance(value, list) or _is_number(value, at_least=0)):
            given = f"optimizer.params.{name} is {shown(value)}"
            raise UserError(f"{given}, but must be a finite number, 0 or more.")
    betas = params.get("betas", [])
    if not isinstance(betas, (list, tuple)) or not all(_is_number(b, at_least=0) and b < 1 for b in betas):
        raise UserError(f"optimizer.params.betas is {shown(betas)}, but must be numbers from 0 to below 1.")


def check_scheduler(kind: str, params: Mapping[str, Any], *, optimizer: str | None, complete: bool) -> None:
    """Check `scheduler.type` and `scheduler.params`; `complete`: required arguments too. Raises UserError."""
    import torch
    from deepspeed.runtime import lr_schedules

    from toolkit.optim import find_rule

    in_torch = _torch_names("torch.optim.lr_scheduler", "LRScheduler")
    in_deepspeed = lr_schedules.VALID_LR_SCHEDULES
    own = kind in in_deepspeed
    if not own and kind not in in_torch:
        raise UserError(
            f"scheduler.type {kind!r} is unknown; it names one of {', '.join(in_deepspeed)} or a class of "
            f"torch.optim.lr_scheduler.{nearest(kind, [*in_deepspeed, *in_torch])}"
        )
    arguments = _arguments(getattr(lr_schedules if own else torch.optim.lr_scheduler, kind))
    for name, value in params.items():
        if name not in arguments:
            raise UserError(unknown_key([*_SCHEDULE, name], arguments))
        if own:
            _check_argument(name, value, arguments[name])
    missing = [n for n, p in arguments.items() if p.default is p.empty and n not in params]
    if complete and missing:
        raise UserError(f"scheduler.params lacks {missing[0]!r}, which {kind} needs.")
    if kind == "OneCycle" and find_rule(optimizer) and params.get("cycle_momentum", True):
        raise UserError(
            f"scheduler.type 'OneCycle' with cycle_momentum overwrites the betas of {optimizer} at every step; "
            "set scheduler.params.cycle_momentum to false."
        )


def _check_argument(name: str, value: Any, parameter: inspect.Parameter) -> None:
    default, declared = parameter.default, str(parameter.annotation)
    if name == "warmup_type":
        # DeepSpeed takes any other word for "log" and only logs it.
        good, allowed = value in ("log", "linear"), '"log" or "linear"'
    elif isinstance(default, bool):
        good, allowed = isinstance(value, bool), "true or false"
    elif name in ("warmup_num_steps", "total_num_steps"):
        good, allowed = type(value) is int and value > 0, "a positive whole number"
    elif name == "last_batch_iteration":
        good, allowed = type(value) is int and value >= -1, "a whole number, -1 or more"
    else:
        good = _is_number(value, at_least=0) or (value is None and default is None)
        # Rates may be given per parameter group.
        if isinstance(value, list) and "int" not in declared:
            good = all(_is_number(v, at_least=0) for v in value)
        allowed = "a finite number, 0 or more"
    if not good:
        hint = nearest(value, ("log", "linear")) if name == "warmup_type" and isinstance(value, str) else ""
        raise UserError(f"scheduler.params.{name} is {shown(value)}, but must be {allowed}.{hint}")


def _is_number(value: Any, *, at_least: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= at_least


def _torch_names(module: str, base: str) -> list[str]:
    import importlib

    namespace = importlib.import_module(module)
    parent = getattr(namespace, base)
    return [
        name
        for name, found in vars(namespace).items()
        if inspect.isclass(found) and issubclass(found, parent) and found is not parent
    ]
