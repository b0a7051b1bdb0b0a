"""DeepSpeed's monitors, which sections of its JSON enable: none that fails ends a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from toolkit.errors import UserError
from toolkit.records.run import METRICS
from toolkit.run import ranks
from toolkit.sentences import one_line, value_at

if TYPE_CHECKING:
    from toolkit.run.tracking import Tracker

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None, "comet": "comet_ml"}
"""What each section's monitor imports, in DeepSpeed's order."""
SECTIONS = tuple(_PACKAGES)
_STEPS_ONLY = "wandb"
"""It takes no step below the last one, and DeepSpeed's engine counts sequences where a run counts steps."""


def enabled(config: Mapping[str, Any]) -> list[str]:
    """The sections of the DeepSpeed JSON whose monitors are on."""
    return [name for name in SECTIONS if _is_on(value_at(config, f"{name}.enabled"))]


def _is_on(value: Any) -> bool:
    """As DeepSpeed reads it: 1, "True" and "yes" are on, too."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:  # which the check of the whole JSON refuses
        return False


def check_one(tracker: Tracker | None, config: Mapping[str, Any]) -> None:
    """Raise UserError where a monitor of the JSON has the one W&B run that a process can write to."""
    if tracker == "wandb" and "wandb" in enabled(config):
        raise UserError(
            "--track wandb and wandb.enabled in the DeepSpeed JSON would write to one W&B run, which takes no step "
            "twice; give --track none, or --set wandb.enabled=false."
        )


def check_packages(config: Mapping[str, Any]) -> None:
    """Raise UserError where the package of a monitor that is on is missing."""
    for name in enabled(config):
        package = _PACKAGES[name]
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{name}.enabled in the DeepSpeed JSON needs a package that is not installed: pip install {package}, "
                f"or --set {name}.enabled=false."
            )


class Monitors:
    """The monitors that `config`, the DeepSpeed JSON, enables, on rank 0; the engine writes to them, too.

    One that does not start, or fails later, is said once by `say`; the others and the run go on.
    """

    def __init__(self, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Any] = {}
        for name in enabled(config) if ranks.rank() == 0 else ():
            try:
                self._open[name] = _monitor(name, config[name])
            except Exception as error:
                self._give_up(name, error)

    @property
    def enabled(self) -> bool:
        """Asked by the engine, before it writes."""
        return bool(self._open)

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """What the engine writes by itself, over the sequences seen."""
        self._write(events, [name for name in self._open if name != _STEPS_ONLY])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of a step, by the name of their curve."""
        self._write([(name, value, step) for name, value in values.items()], list(self._open))

    def _write(self, events: list[tuple[str, float, int]], names: Iterable[str]) -> None:
        for name in names:
            try:
                self._open[name].write_events(events)
            except Exception as error:
                del self._open[name]
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._say(
            f"note: {name} of the DeepSpeed JSON: {one_line(error).rstrip('.')}; nothing more is written there, and "
            f"the run continues: {METRICS} has every step."
        )


def _monitor(name: str, section: Mapping[str, Any]) -> Any:
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    return MonitorMaster(get_monitor_config({name: section}))
