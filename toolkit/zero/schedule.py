"""Learning rate schedules after a load: every parameter group has the rate that the schedule gives at that step.

Three kinds of schedule have three ways there:

* DeepSpeed's work a rate out from the count of steps, so the count is set.
* torch's work most rates out from the one before, and keep what they were built with in their state. With the same
  settings the state is taken over, and the values that they wrote into the groups. With others the new settings hold:
  the schedule makes as many steps as that of the checkpoint had made. So does one that the checkpoint did not have.
* Of classes of others, the state and the groups are taken over, as with `load_state_dict` of torch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler, swa_utils

from toolkit.checkpoint.content import SCHEDULE
from toolkit.checkpoint.source import Source
from toolkit.errors import UserError
from toolkit.sentences import shown

_TORCH = (lr_scheduler.__name__, swa_utils.__name__)
_PROGRESS = {
    *("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "T_cur", "T_i"),
    *("best", "num_bad_epochs", "cooldown_counter"),
}
"""What changes in the state of torch's schedules from step to step; the rest are settings."""
_UNKNOWN = "of an unknown class"
_BUILT = ("initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum")
"""Keys of a parameter group that torch's schedules write when they are built, and read later."""
_WRITTEN = ("lr", *_BUILT)
_MOMENTUM = ("betas", "momentum")
"""Written at each step by schedules that also move momentum; they leave `max_momentum` in the group."""


def resume(engine: Any, source: Source) -> list[str]:
    """Let the schedule of `engine` continue where that of `source` was; changes nothing but schedule and groups.

    Returns:
        What is not simply continued, a sentence each.

    Raises:
        UserError: the schedule cannot be taken to that step.
    """
    saved = source.model_states()
    scheduler, state = engine.lr_scheduler, saved.get("lr_scheduler") or {}
    groups, old_groups = engine.basic_optimizer.param_groups, source.param_groups()
    kind, was = type(scheduler).__name__, _saved_kind(saved)
    if scheduler is None:
        return _without(groups, old_groups, was)
    step = saved["global_steps"] - saved["skipped_steps"]
    same = was == kind or (was == _UNKNOWN and state.keys() == _state_of(scheduler).keys())
    if same:
        step = _count(state, step)
        changed = _changed_settings(scheduler, state, groups, old_groups)
        if changed is None:
            _take_over(scheduler, state, groups, old_groups)
            return []
        said = f"of the schedule {kind} {changed}: the new settings hold from step {step} on"
    elif was is None:
        said = f"the checkpoint has no schedule: {kind} begins at step {step}"
    else:
        said = f"the schedule was {was} and is {kind}, which begins at step {step}"
    if not isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        _advance(scheduler, kind, step)
    elif same:
        _take_over(scheduler, {key: state[key] for key in _PROGRESS & state.keys()}, groups, old_groups)
    else:
        scheduler.last_epoch = step
        said += ", without the metrics of the steps before"
    return [said]


def _without(groups: list[dict[str, Any]], old_groups: list[dict[str, Any]], was: str | None) -> list[str]:
    """The engine has no schedule: its own rates stay."""
    old, new = ([float(group["lr"]) for group in some if "lr" in group] for some in (old_groups, groups))
    if was is not None:
        return [f"the checkpoint's schedule ({was}) ends here, since this engine has none: its rate is {new[0]:g}"]
    if old and len(old) == len(new) and old != new:
        return [f"the learning rate was {old[0]:g} and is {new[0]:g}"]
    return []


# ---- is it the same schedule? ---------------------------------------------------------------------------------------


def _saved_kind(saved: Mapping[str, Any]) -> str | None:
    """The class of a checkpoint's schedule, `_UNKNOWN` if it does not say; None if it has none."""
    if saved.get("lr_scheduler") is None:
        return None
    if SCHEDULE in saved:
        return str(saved[SCHEDULE])
    # DeepSpeed's own checkpoints have no more than the JSON.
    config = saved.get("ds_config")
    section = config.get("scheduler") if isinstance(config, Mapping) else None
    return str(section["type"]) if section and section.get("type") else _UNKNOWN


def _changed_settings(
    scheduler: Any,
    state: Mapping[str, Any],
    groups: list[dict[str, Any]],
    old_groups: list[dict[str, Any]],
) -> str | None:
    """The first setting that differs, in half a sentence; None where all are the same or are not kept."""
    if type(scheduler).__module__ not in _TORCH:
        return None
    if len(groups) != len(old_groups):
        return f"the parameter groups were {len(old_groups)} and are {len(groups)}"
    built = [
        (key, (old[key], new[key]))
        for old, new in zip(old_groups, groups, strict=True)
        for key in _BUILT
        if key in old and key in new
    ]
    for key, (was, now) in (*_pairs(_state_of(scheduler), state), *built):
        if not _equal(was, now):
            name = {"base_lrs": "learning rates", "initial_lr": "learning rate"}.get(key, key)
            return f"the {name} was {shown(was)} and is {shown(now)}"
    return None


def _pairs(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(name, (saved, present)) of the settings that both states have, those of schedules inside as well."""
    inside = list(zip(here.get("_schedulers", ()), there.get("_schedulers", ()), strict=False))
    if len(here.get("_schedulers", ())) != len(there.get("_schedulers", ())):
        yield "number of schedules", (len(there["_schedulers"]), len(here["_schedulers"]))
    for own, old in inside:
        if own.keys() != old.keys():
            yield "kind of a schedule inside", (sorted(old), sorted(own))
        yield from _pairs(own, old)
    for key in sorted((here.keys() & there.keys()) - _PROGRESS - {"_schedulers"}):
        if not callable(here[key]):
            yield key, (there[key], here[key])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _state_of(scheduler: Any) -> dict[str, Any]:
    state: dict[str, Any] = scheduler.state_dict()
    return state


# ---- continuing -----------------------------------------------------------------------------------------------------


def _take_over(
    scheduler: Any, state: Mapping[str, Any], groups: list[dict[str, Any]], old_groups: list[dict[str, Any]]
) -> None:
    scheduler.load_state_dict(_loadable(scheduler, state))
    count = getattr(scheduler, "last_batch_iteration", None)
    if isinstance(count, int):  # DeepSpeed's: the count is all that they keep
        if count >= 0:
            scheduler.step(count)
        return
    for group, old in zip(groups, old_groups, strict=False):
        for key in (*_WRITTEN, *(_MOMENTUM if "max_momentum" in old else ())):
            if key in old:
                _set(group, key, old[key])
    if isinstance(scheduler, lr_scheduler.LambdaLR):
        # Its functions are not saved, and may be others now.
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            _set(group, "lr", base * factor(scheduler.last_epoch))


def _loadable(scheduler: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `state`, for schedules take theirs apart, with functions as they are here: they cannot be saved."""
    own = _state_of(scheduler)
    made = {key: copy.deepcopy(value) for key, value in state.items() if not callable(own.get(key))}
    if "_schedulers" in made:
        parts = zip(scheduler._schedulers, state["_schedulers"], strict=True)
        made["_schedulers"] = [_loadable(part, inner) for part, inner in parts]
    return made


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    else:
        group[key] = copy.deepcopy(value)


def _count(state: Mapping[str, Any], default: int) -> int:
    """Steps that a schedule has made."""
    for part in _unchained(state):
        if "last_epoch" in part:
            return int(part["last_epoch"])
        if "last_batch_iteration" in part:
            return int(part["last_batch_iteration"]) + 1
    return default


def _unchained(state: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """A ChainedScheduler keeps no count of its own."""
    return [state, *state.get("_schedulers", ())]


def _advance(scheduler: Any, kind: str, step: int) -> None:
    """Bring a schedule to `step`, as if it had been there from the beginning."""
    if hasattr(scheduler, "last_batch_iteration"):
        if step > 0:
            scheduler.step(step - 1)
        return
    made = _count(_state_of(scheduler), 0)
    if made > step:
        raise UserError(
            f"the schedule {kind} has made {made} steps already and cannot go back to step {step}; load into an engine "
            "that has made none"
        )
    with warnings.catch_warnings():  # torch's, that the optimizer has made no step in between
        warnings.simplefilter("ignore", UserWarning)
        try:
            for _ in range(step - made):
                scheduler.step()
        except (ValueError, TypeError) as error:
            raise UserError(f"the schedule {kind} cannot be brought to step {step}: {error}") from error
