"""Checks of `scheduler`: names that DeepSpeed would find, arguments that their classes take, rates that come out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from toolkit.config.signatures import arguments_of, is_number, torch_names
from toolkit.errors import UserError, nearest
from toolkit.sentences import shown, unknown_key

_PLACE = ["scheduler", "params"]
_TRIAL_STEPS = 5
# Arguments whose values no JSON can hold.
_FUNCTIONS = {"lr_lambda": "functions", "schedulers": "other schedulers", "scale_fn": "a function"}
# Optimizers of DeepSpeed without betas; what they have instead.
_WITHOUT_BETAS = {"adagrad": (), "muon": (), "musgd": ("momentum",)}

LENGTHS = {
    "CosineAnnealingLR": ("T_max", "the rate rises again"),
    "OneCycleLR": ("total_steps", "the schedule cannot continue"),
    "PolynomialLR": ("total_iters", "the rate is 0"),
    "LinearLR": ("total_iters", "the rate stays as it is"),
    "ConstantLR": ("total_iters", "the rate stays as it is"),
}
"""By scheduler of torch: the argument that counts the steps of its schedule, and what comes after them."""


def check_scheduler(
    kind: str,
    params: Mapping[str, Any],
    *,
    optimizer: str | None,
    lr: Any = None,
    complete: bool,
) -> None:
    """Check `scheduler.type` and `scheduler.params`.

    Args:
        kind, params: `scheduler.type` and `scheduler.params`.
        optimizer, lr: `optimizer.type` and its rate, where they are known.
        complete: the run fills nothing in; every argument that is required must be there.

    Raises UserError.
    """
    import torch
    from deepspeed.runtime import lr_schedules

    in_torch = torch_names("torch.optim.lr_scheduler", "LRScheduler")
    in_deepspeed = lr_schedules.VALID_LR_SCHEDULES
    own = kind in in_deepspeed
    if not own and kind not in in_torch:
        raise UserError(
            f"scheduler.type {kind!r} is unknown; it names one of {', '.join(in_deepspeed)} or a class of "
            f"torch.optim.lr_scheduler.{nearest(kind, [*in_deepspeed, *in_torch])}"
        )
    scheduler = getattr(lr_schedules if own else torch.optim.lr_scheduler, kind)
    arguments = arguments_of(scheduler)
    _check_buildable(kind, scheduler, params)
    for name, value in params.items():
        if name not in arguments:
            raise UserError(unknown_key([*_PLACE, name], arguments))
        if own:
            _check_argument(name, value, arguments[name])
        else:
            _check_numbers(name, value)
    _check_momentum(kind, params, optimizer, arguments)
    missing = [n for n, p in arguments.items() if p.default is p.empty and n not in params]
    if kind == "OneCycleLR" and not {"epochs", "steps_per_epoch"} <= params.keys() and "total_steps" not in params:
        missing.append("total_steps")
    if complete and missing:
        raise UserError(f"scheduler.params lacks {missing[0]!r}, which {kind} needs.")
    if not missing:
        _try(kind, scheduler, params, optimizer, lr)


def _check_buildable(kind: str, scheduler: Any, params: Mapping[str, Any]) -> None:
    if kind == "ReduceLROnPlateau":
        raise UserError(
            "scheduler.type 'ReduceLROnPlateau' needs a metric at every step, which no JSON names (DeepSpeed would "
            "give it the batch size); hand initialize `lr_scheduler=lambda optimizer: ...` and call "
            "engine.step(lr_kwargs={'metrics': loss})."
        )
    everything = inspect.signature(scheduler).parameters
    for name, what in _FUNCTIONS.items():
        parameter = everything.get(name)
        if parameter is not None and (parameter.default is parameter.empty or params.get(name) is not None):
            raise UserError(
                f"scheduler.type {kind!r} takes {what} as {name!r}, which a JSON cannot hold; leave the scheduler out "
                "and hand initialize `lr_scheduler=lambda optimizer: ...`."
            )


def _check_momentum(
    kind: str, params: Mapping[str, Any], optimizer: str | None, arguments: Mapping[str, inspect.Parameter]
) -> None:
    from toolkit.optim import find_rule

    if "cycle_momentum" in arguments and find_rule(optimizer) and params.get("cycle_momentum", True):
        raise UserError(
            f"scheduler.type {kind!r} with cycle_momentum overwrites the betas of {optimizer} at every step; "
            "set scheduler.params.cycle_momentum to false."
        )


def _check_argument(name: str, value: Any, parameter: inspect.Parameter) -> None:
    """One argument of a scheduler of DeepSpeed, which checks hardly any."""
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
        good = is_number(value, at_least=0) or (value is None and default is None)
        # Rates may be given per parameter group.
        if isinstance(value, list) and "int" not in declared:
            good = all(is_number(v, at_least=0) for v in value)
        allowed = "a finite number, 0 or more"
    if not good:
        hint = nearest(value, ("log", "linear")) if name == "warmup_type" and isinstance(value, str) else ""
        raise UserError(f"scheduler.params.{name} is {shown(value)}, but must be {allowed}.{hint}")


def _check_numbers(name: str, value: Any) -> None:
    """One argument of a scheduler of torch; of what type it must be, a trial shows."""
    if name == "last_epoch":
        if value != -1:
            raise UserError(
                f"scheduler.params.last_epoch is {shown(value)}, but a schedule begins at the run's first step; leave "
                "it out (a checkpoint brings its own)."
            )
        return
    for number in value if isinstance(value, list) else [value]:
        if type(number) in (int, float) and not is_number(number, at_least=0):
            raise UserError(f"scheduler.params.{name} is {shown(value)}, but must be finite and 0 or more.")


def _try(kind: str, scheduler: Any, params: Mapping[str, Any], optimizer: str | None, lr: Any) -> None:
    """Let it set the rates of a few steps: types and values that do not fit show as DeepSpeed's or torch's error."""
    lists = [len(value) for name, value in params.items() if isinstance(value, list) and name != "milestones"]
    groups = _stand_in(optimizer, lr, max(lists, default=1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = scheduler(groups, **params)
            # This one cannot continue after its last step.
            for _ in range(min(getattr(made, "total_steps", _TRIAL_STEPS), _TRIAL_STEPS)):
                made.step()
    except Exception as error:
        raise UserError(
            f"scheduler.params: {kind} refuses {shown(dict(params))}: {type(error).__name__}: {error}."
        ) from None
    for group in groups.param_groups:
        if not is_number(group["lr"], at_least=0):
            raise UserError(
                f"scheduler.params: {kind} sets a learning rate of {group['lr']!r} with {shown(dict(params))}; rates "
                "must be finite and 0 or more."
            )


def _stand_in(kind: str | None, lr: Any, groups: int) -> Any:
    """An optimizer of torch with so many groups and with those hyper-parameters of `kind` that schedulers set."""
    import torch

    known = vars(torch.optim).get(kind or "")
    if inspect.isclass(known) and (kind or "").lower() not in _WITHOUT_BETAS:
        names = tuple(arguments_of(known))
    else:
        names = _WITHOUT_BETAS.get((kind or "").lower(), ("betas",))
    rate = lr if is_number(lr, at_least=0) else 1e-3
    values = {"lr": rate, "betas": (0.9, 0.999), "momentum": 0.9}
    members = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)]
    return torch.optim.Optimizer(members, {key: values[key] for key in values if key in ("lr", *names)})


def scheduler_arguments(kind: str) -> set[str]:
    """What `scheduler.params` may hold for `kind`; empty where that is not known."""
    import torch
    from deepspeed.runtime import lr_schedules

    own = kind in lr_schedules.VALID_LR_SCHEDULES
    found = getattr(lr_schedules if own else torch.optim.lr_scheduler, kind, None)
    return set(arguments_of(found)) if inspect.isclass(found) else set()


def rates(params: Mapping[str, Any]) -> list[float]:
    """The finite rates that `scheduler.params` name as peaks."""
    found: list[Any] = []
    for name in ("warmup_max_lr", "cycle_max_lr", "max_lr"):
        value = params.get(name)
        found += value if isinstance(value, list) else [value]
    return [value for value in found if is_number(value, at_least=0)]
