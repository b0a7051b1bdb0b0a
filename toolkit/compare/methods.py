"""What `--methods` and `--sweep` say: shipped configs, rules, classes by import path, files of one's own."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from toolkit.compare.plan import NAME, Method, PlanPart, Sweep
from toolkit.config import apply_overrides, load_config, shipped_configs
from toolkit.errors import UserError, nearest, some
from toolkit.sentences import explain

_FILES = (".json", ".toml")
_BASE = "adamw_zero{stage}"
"""Of a method that is no config, all but the optimizer: precision, clipping, schedule, ZeRO."""


class _Entry(PlanPart):
    """One method in a file of methods."""

    config: str | dict[str, Any]
    set: dict[str, Any] = {}
    sweep: dict[str, list[float]] | None = None
    lr_factor: Annotated[float, Field(gt=0)] = 1.0
    """What the shared sweep's rates are multiplied with."""


def read_methods(given: Sequence[str], sweeps: Sequence[Sweep], stage: int, overrides: Sequence[str]) -> list[Method]:
    """The methods that the values of `--methods` name, in this order.

    Args:
        given: each a list with commas (a name, or NAME=config), or the path of a JSON or TOML file.
        sweeps: of methods that have none of their own.
        stage: of ZeRO, where the name of a method leaves it open.
        overrides: "KEY=VALUE", written into every method's JSON; a method's own settings come after them.

    Raises:
        UserError: the first name, file or value that is not right.
    """
    found: list[Method] = []
    for value in given:
        if "=" not in value and "," not in value and Path(value).suffix in _FILES:
            found += _from_file(Path(value), sweeps, stage, overrides)
            continue
        for part in filter(None, (part.strip() for part in value.split(","))):
            name, equals, config = part.partition("=")
            method = _method(name, config if equals else name, stage, overrides, {})
            found.append(method.model_copy(update={"sweeps": list(sweeps)}))
    for index, method in enumerate(found):
        if method.name in (other.name for other in found[:index]):
            raise UserError(f"--methods has two methods {method.name!r}; name one of them, as in NAME={method.origin}.")
    if not found:
        raise UserError("--methods names no method.")
    return found


def read_sweep(text: str) -> Sweep:
    """The sweep of "KEY=VALUE,VALUE,...".

    Raises:
        UserError: it is not of this form, or has a value twice.
    """
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise UserError(f"--sweep {text}: give a key and its values, as in lr=3e-4,6e-4,1.2e-3.")
    return _checked(key.strip(), [_number(key, part) for part in values.split(",") if part.strip()])


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"--sweep {key}: {text.strip()!r} is no finite number.")
    return value


def _checked(key: str, values: Sequence[float]) -> Sweep:
    known = ("lr", "warmup")
    if key not in known and "." not in key:
        hint = nearest(key, known) or f" Or did you mean 'optimizer.params.{key}'?"
        raise UserError(f"--sweep {key}: a sweep is of lr, of warmup or of a dotted key of the DeepSpeed JSON.{hint}")
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise UserError(f"--sweep {key}: the value {twice:g} appears twice.")
    if key == "lr" and any(value <= 0 for value in values):
        raise UserError(f"--sweep lr: {min(values):g} is no learning rate; rates are above 0.")
    return Sweep(key=key, values=sorted(values))


def _from_file(path: Path, sweeps: Sequence[Sweep], stage: int, overrides: Sequence[str]) -> list[Method]:
    content = _read(path)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"--methods {path}: a file of methods is one object, of methods by name.")
    found = []
    for name, value in content.items():
        try:
            entry = _Entry.model_validate({"config": value} if isinstance(value, str) else value)
        except ValidationError as error:
            raise UserError(f"--methods {path}: {explain(error, _Entry, (name,))}") from None
        method = _method(name, entry.config, stage, overrides, entry.set, folder=path.parent)
        own = [_checked(key, values) for key, values in entry.sweep.items()] if entry.sweep is not None else None
        found.append(method.model_copy(update={"sweeps": own if own is not None else _scaled(sweeps, entry.lr_factor)}))
    return found


def _scaled(sweeps: Sequence[Sweep], factor: float) -> list[Sweep]:
    return [
        Sweep(key=sweep.key, values=[float(f"{value * factor:.6g}") for value in sweep.values])
        if sweep.key == "lr"
        else sweep
        for sweep in sweeps
    ]


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--methods {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    try:
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--methods {path} is not valid {path.suffix[1:].upper()}: {error}.") from None


def _method(
    name: str,
    config: str | dict[str, Any],
    stage: int,
    overrides: Sequence[str],
    own: Mapping[str, Any],
    folder: Path = Path(),
) -> Method:
    if not re.fullmatch(NAME, name):
        raise UserError(f"--methods: {name!r} is no name for a method; use letters, digits, '_', '-', '.' and '+'.")
    content, origin = (config, name) if isinstance(config, dict) else _content(config, stage, folder)
    content = apply_overrides(load_config(content), list(overrides))
    for key, value in own.items():
        content = apply_overrides(content, [f"{key}={json.dumps(value)}"])
    return Method(name=name, origin=origin, config=content)


def _content(config: str, stage: int, folder: Path) -> tuple[dict[str, Any], str]:
    """The JSON that `config` names, and where it is from."""
    from toolkit.optim import RULES, find_rule

    shipped = shipped_configs()
    for name in (config, f"{config}_zero{stage}"):
        if name in shipped:
            return load_config(name), name
    if "/" in config or config.endswith(".json"):
        path = Path(config).expanduser()
        return load_config(path if path.is_absolute() or path.is_file() else folder / path), config
    rule = find_rule(config)
    if rule is None and "." not in config:
        known = [
            *RULES,
            *sorted({key.partition("_zero")[0] for key in shipped}),
        ]  # of two spellings the last is offered
        raise UserError(
            f"--methods: {config!r} is no shipped config, no rule, no file (NAME=path/to/config.json) and no class by "
            f"its import path (torch.optim.AdamW).{nearest(config, known) or f' Known are {some(known, 20)}.'}"
        )
    base = copy.deepcopy(load_config(_BASE.format(stage=stage)))
    kind = rule.__name__ if rule is not None else config
    # A rule at its own defaults; the rate is the one key that every run may set.
    base["optimizer"] = {"type": kind, "params": {"lr": base["optimizer"]["params"]["lr"]}}
    base["zero_allow_untested_optimizer"] = True
    return base, kind
