"""What a comparison does: the methods, what is swept, the seeds, and the settings that all runs share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from toolkit.errors import UserError
from toolkit.masking import masked
from toolkit.paths import read_text, replace_text
from toolkit.records.activations import renamed
from toolkit.sentences import explain, shown

PLAN, CONFIGS, RUNS = "plan.json", "configs", "runs"
"""In the folder of a comparison: the plan, a DeepSpeed JSON for each method, and the run folders."""
NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
"""Of a method: it is the name of a folder, too."""

KEPT = ("seeds", "extend", "baseline")
"""Attributes of a plan that stay as they are where the command that extends it does not give them."""

Point = tuple[tuple[str, float], ...]
"""Swept keys with their values, in the order in which they are swept."""


class PlanPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Sweep(PlanPart):
    """One key and the values that are tried: "lr", "warmup", or a dotted key of the DeepSpeed JSON."""

    key: str
    values: Annotated[list[float], Field(min_length=1)]


class Method(PlanPart):
    """A way to train: a DeepSpeed JSON, whole, and what is swept over it."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    origin: str
    """Where the JSON comes from, in words."""
    config: dict[str, Any]
    sweeps: list[Sweep] = []


class Plan(PlanPart):
    """A whole comparison.

    Attributes:
        settings: options of launch/train.py that every run gets, by their names in `RunSettings`.
        ranks: of each run.
        seeds: 0 to `seeds` - 1; the sweep is made with the first.
        extend: values at most that are added to a sweep whose best value is the first or the last.
        baseline: the method that all others are compared with.
    """

    settings: Annotated[dict[str, Any], BeforeValidator(renamed)]
    ranks: Annotated[int, Field(gt=0)] = 1
    seeds: Annotated[int, Field(gt=0)] = 3
    extend: Annotated[int, Field(ge=0)] = 4
    baseline: str
    methods: list[Method]


def load(folder: Path) -> Plan | None:
    """The plan of the comparison in `folder`, or None where there is none yet.

    Raises:
        UserError: its file is no plan.
    """
    if not (folder / PLAN).exists():
        return None
    try:
        return Plan.model_validate(json.loads(read_text(folder, PLAN)))
    except ValidationError as error:
        raise UserError(f"{folder / PLAN} is no plan of a comparison: {explain(error, Plan)}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / PLAN} is not valid JSON.") from None


def save(plan: Plan, folder: Path) -> None:
    """Write the plan and each method's DeepSpeed JSON."""
    (folder / CONFIGS).mkdir(parents=True, exist_ok=True)
    replace_text(folder / PLAN, json.dumps(masked(plan.model_dump(mode="json")), indent=1) + "\n")
    for method in plan.methods:
        replace_text(folder / CONFIGS / f"{method.name}.json", json.dumps(method.config, indent=1) + "\n")


def extended(old: Plan | None, new: Plan, folder: Path, kept: Sequence[str] = ()) -> Plan:
    """`new` with what is in `old` and not in it: methods, values of the same sweeps, and the attributes `kept`.

    Raises:
        UserError: runs that are there already would not be those of the new plan.
    """
    if old is None:
        return new
    changed = [
        (name, old.settings.get(name), new.settings.get(name))
        for name in sorted({*old.settings, *new.settings})
        if old.settings.get(name) != new.settings.get(name)
    ]
    if old.ranks != new.ranks:
        changed.append(("ranks", old.ranks, new.ranks))
    if changed:
        name, before, now = changed[0]
        raise UserError(
            f"{folder} holds a comparison with {name} {shown(before)}, and this one has {shown(now)}: its runs cannot "
            "be compared with the new ones; give another --out."
        )
    methods = {method.name: method for method in old.methods}
    for method in new.methods:
        before_it = methods.get(method.name)
        if before_it is not None:
            if before_it.config != method.config:
                key = _difference(before_it.config, method.config)
                raise UserError(
                    f"{folder} holds runs of a method {method.name!r} whose config differs at {key}; give this one "
                    f"another name, as in --methods NAME={method.origin}, or give another --out."
                )
            method = method.model_copy(update={"sweeps": _joined(before_it.sweeps, method.sweeps)})
        methods[method.name] = method
    return new.model_copy(update={name: getattr(old, name) for name in kept} | {"methods": list(methods.values())})


def _joined(old: Sequence[Sweep], new: Sequence[Sweep]) -> list[Sweep]:
    """The new sweeps, each with the values that the old one of the same key had, too."""
    before = {sweep.key: sweep.values for sweep in old}
    return [Sweep(key=sweep.key, values=sorted({*before.get(sweep.key, ()), *sweep.values})) for sweep in new] or list(
        old
    )


def _difference(old: Any, new: Any, place: str = "") -> str:
    """The dotted key of the first difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in sorted({*old, *new}) if old.get(key) != new.get(key) or (key in old) != (key in new))
        return _difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    return place
