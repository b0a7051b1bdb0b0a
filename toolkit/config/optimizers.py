"""Checks of `optimizer`: names that DeepSpeed would find, arguments that their classes take."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from toolkit.config.deepspeed import DeepSpeedSettings
from toolkit.config.outside import check_outside, is_outside, try_step
from toolkit.config.signatures import arguments_of, is_number, torch_names
from toolkit.errors import UserError, nearest
from toolkit.sentences import shown, unknown_key

_PLACE = ["optimizer", "params"]
# Optimizers that DeepSpeed had before 0.19, in its spelling.
_REMOVED = ("OneBitAdam", "OneBitLamb", "ZeroOneAdam")
# Read by DeepSpeed itself before it calls the class.
_ADAM_SWITCHES = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}


def check_optimizer(kind: str, params: Mapping[str, Any], *, offloaded: bool) -> None:
    """Check `optimizer.type` and `optimizer.params`; `offloaded` says whether the step runs on the host.

    Raises UserError.
    """
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    from toolkit.optim import OPTIONS, RULES, check_params, find_rule

    in_torch = torch_names("torch.optim", "Optimizer")
    if find_rule(kind):
        try:
            check_params(kind, dict(params))
        except ValueError as error:
            raise UserError(f"optimizer.params: {error}") from None
        return
    if is_outside(kind):
        _check_common(params)
        check_outside(kind, params)
        return
    if kind.lower() in map(str.lower, _REMOVED):
        raise UserError(
            f"optimizer.type {kind!r} is no longer part of DeepSpeed, which has removed its 1-bit optimizers; use one "
            f"of AdamW, {', '.join(RULES)}."
        )
    if kind.lower() not in DEEPSPEED_OPTIMIZERS and kind not in in_torch:
        if (rule := _unregistered(kind)) is not None:
            raise UserError(
                f"optimizer.type {kind!r} is no optimizer yet: {rule.__name__} is defined in "
                f"{inspect.getsourcefile(rule)}, but not registered; add {rule.__name__.removesuffix('Rule')} = "
                f"as_optimizer({rule.__name__}) there."
            )
        # Of spellings that differ in case only, the last is offered.
        hint = nearest(kind, [*DEEPSPEED_OPTIMIZERS, *in_torch, *RULES])
        raise UserError(
            f"optimizer.type {kind!r} is unknown; it names one of {', '.join(RULES)}, a rule that --plugin imports, an "
            f"optimizer of DeepSpeed ({', '.join(DEEPSPEED_OPTIMIZERS)}), a class of torch.optim, or one of another "
            f"package by its import path.{hint}"
        )
    own = find_rule(f"{kind}8")
    ours = next((name for name in params if own and name in OPTIONS), None)
    if own and ours:
        raise UserError(
            f"optimizer.params.{ours} is of this package's optimizers, and optimizer.type {kind!r} is DeepSpeed's; "
            f"set optimizer.type to {own.__name__!r}, or leave {ours} out."
        )
    if "max_grad_norm" in params:
        raise UserError("DeepSpeed refuses optimizer.params.max_grad_norm; set gradient_clipping instead.")
    if accepted := _accepted(kind, params, offloaded):
        for name in params:
            if name not in accepted:
                raise UserError(unknown_key([*_PLACE, name], accepted, "hyper-parameter"))
    _check_common(params)
    if kind.lower() in DEEPSPEED_OPTIMIZERS:
        _check_own(kind, params)
    else:
        # On which devices it works is no matter of the JSON.
        arguments = {key: value for key, value in params.items() if key not in ("capturable", "fused")}
        try_step(f"torch.optim.{kind}", getattr(torch.optim, kind), arguments, (2, 2))


def _unregistered(kind: str) -> type | None:
    """The rule that an optimizer called `kind` would run, if it is defined and nobody has made an optimizer of it."""
    from toolkit.optim import Rule

    found: list[type] = [Rule]
    for rule in found:  # which grows meanwhile
        found += rule.__subclasses__()
    return next((rule for rule in found[1:] if rule.__name__.removesuffix("Rule").lower() == kind.lower()), None)


def check_ready(ds: DeepSpeedSettings, total_steps: int | None) -> None:
    """Raise UserError where a rule needs a number of steps and neither its parameters nor the run says one."""
    optimizer = ds.rule
    assert optimizer is not None, ds.optimizer
    known = {key: value for key, value in ds.params.items() if key in optimizer.rule.model_fields}
    known = optimizer.rule.supply(known, total_steps=total_steps or ds.scheduler_params.get("total_num_steps"))
    try:
        optimizer.rule.parse(known, where=str(ds.optimizer)).check_ready()
    except UserError as error:
        raise UserError(f"optimizer.params: {error}") from None


def optimizer_arguments(kind: str) -> set[str]:
    """Hyper-parameters that `optimizer.type` takes; empty where that is not known."""
    import torch

    from toolkit.optim import find_rule

    rule = find_rule(kind)
    if rule is not None:
        return set(inspect.signature(rule).parameters) - {"params"}
    if inspect.isclass(getattr(torch.optim, kind, None)) or kind.lower() in (
        "adam",
        "adamw",
        "adagrad",
        "lamb",
        "lion",
    ):
        return _accepted(kind, {}, offloaded=False)
    return set()


def _check_own(kind: str, params: Mapping[str, Any]) -> None:
    """What DeepSpeed's own optimizers refuse once they are built, or at the first step."""
    adam = kind.lower() in ("adam", "adamw")
    betas = params.get("betas")
    if betas is not None and len(betas) != 2:
        raise UserError(f"optimizer.params.betas is {shown(betas)}, but {kind} takes two.")
    if params.get("amsgrad") and not (adam and params.get("torch_adam")):
        raise UserError(
            f"optimizer.params.amsgrad is true, which DeepSpeed's {kind} does not support; leave it out"
            f"{', or set torch_adam to true beside it' if adam else ''}."
        )
    if kind.lower().startswith("mu") and kind.lower() != "muon" and importlib.util.find_spec("mup") is None:
        raise UserError(f"optimizer.type {kind!r} needs the package mup, which is not installed.")


def check_combination(ds: DeepSpeedSettings, *, accumulation: int | None) -> None:
    """Check what a rule of this package cannot be combined with.

    Args:
        ds: whose `optimizer` is a rule's.
        accumulation: micro-batches per step, None where that is not known yet.

    Raises UserError.
    """
    weights, place = ds.params.get("weights"), "optimizer.params.weights"
    if weights not in (None, "auto", "fp32"):
        if ds.computed != "bf16":
            raise UserError(
                f"{place} {weights!r} is for weights in bf16, but the run computes in {ds.computed}; "
                "enable bf16, or set it to 'fp32'."
            )
        if ds.stage == 0:
            raise UserError(
                f"{place} {weights!r} needs zero_optimization.stage 1, 2 or 3: without ZeRO, DeepSpeed hands fp32 "
                "master weights to the optimizer; set it to 'fp32', or a stage (one rank will do)."
            )
    if ds.releases_gradients:
        place = "optimizer.params.release_gradients"
        if ds.stage == 0:
            raise UserError(f"{place} works at zero_optimization.stage 1, 2 and 3, and it is 0.")
        if ds.waits_for:
            raise UserError(
                f"{place} uses each gradient as soon as it is there, and {ds.optimizer} looks at several parameters "
                f"({ds.waits_for}) before it updates any; leave it out."
            )
        if ds.computed == "fp16":
            raise UserError(f"{place} cannot skip a whole step, as fp16 must for one gradient out of range; use bf16.")
        if accumulation is not None and accumulation > 1:
            raise UserError(
                f"{place} frees each gradient during the backward pass, and gradient_accumulation_steps is "
                f"{accumulation}, whose sum over several takes all that would be freed; set that to 1 and make the "
                "micro-batch larger, for which activations that are not kept make room."
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
        return set(arguments_of(target)) - {"adamw_mode"} | (_ADAM_SWITCHES if adam else set())
    if name in DEEPSPEED_OPTIMIZERS:
        return set()
    return set(arguments_of(getattr(torch.optim, kind)))


def _check_common(params: Mapping[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "momentum"):
        value = params.get(name)
        # Some classes of torch.optim take a pair, or null, here.
        if not (value is None or isinstance(value, list) or is_number(value, at_least=0)):
            given = f"optimizer.params.{name} is {shown(value)}"
            raise UserError(f"{given}, but must be a finite number, 0 or more.")
    betas = params.get("betas", [])
    if not isinstance(betas, (list, tuple)) or not all(is_number(b, at_least=0) and b < 1 for b in betas):
        raise UserError(f"optimizer.params.betas is {shown(betas)}, but must be numbers from 0 to below 1.")
