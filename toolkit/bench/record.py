"""What a benchmark found: settings, machine, and the spread of everything that was timed, as JSON and back."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolkit.errors import UserError
from toolkit.paths import draft_of, read_text, replace_text
from toolkit.records.machine import cores
from toolkit.sentences import explain

Command = Literal["step", "train", "data", "save"]
LEAST = 7
"""Samples that a median is made of, at least."""
QUIET = 0.25
"""Load average for each core above which a machine counts as loaded."""


Positive = Annotated[float, Field(gt=0)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Spread(Part):
    """Of several samples of one quantity: the median and the quartiles."""

    median: Positive
    lower: Positive
    upper: Positive
    samples: Annotated[int, Field(ge=1)]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        if len(ordered) == 1:
            return cls(median=ordered[0], lower=ordered[0], upper=ordered[0], samples=1)
        lower, median, upper = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median=median, lower=lower, upper=upper, samples=len(ordered))


class Row(Part):
    """One thing that was measured.

    Attributes:
        name: what it is; an entry of `--optimizers`, of `--methods`, ...
        at: where it was measured, if the others were measured elsewhere: parameters and tensors.
        timed: spreads by quantity; seconds, or a rate, whose name ends in "_per_s".
        counted: quantities that do not spread, such as bytes a parameter.
    """

    name: str
    at: dict[str, int] = {}
    timed: dict[str, Spread]
    counted: dict[str, float] = {}

    @property
    def key(self) -> tuple[str, tuple[tuple[str, int], ...]]:
        return self.name, tuple(sorted(self.at.items()))


class Machine(Part):
    """What figures depend on beside the code."""

    processor: str
    instructions: str
    cores: int
    threads: int
    device: str


WAYS = {"train": 2, "save": 2, "data": 2}
"""How a command measures now, counted up when its figures come to mean something else; 1 where it is not named."""


class Record(Part):
    """All that one call of `toolkit bench` found.

    Attributes:
        settings: what is measured; figures with others do not compare.
        way: how its command measures, of WAYS; figures of another do not compare, whatever the settings.
        options: of the command line, to measure the same again.
        load: the load average of the last minute before the benchmark began.
        left_out: by name, why something that was asked for was not measured.
    """

    command: Command
    way: int = 1
    settings: dict[str, Any]
    options: dict[str, Any]
    machine: Machine
    load: float
    began: str
    versions: dict[str, str]
    rows: list[Row]
    left_out: dict[str, str] = {}
    notes: list[str] = []


def machine(device: str) -> Machine:
    """This machine, with the number of threads that torch uses now; `device`: "cpu" or "cuda"."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else device
    return Machine(
        processor=_processor(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        cores=cores(),
        threads=torch.get_num_threads(),
        device=name,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def load_average() -> float:
    """Of the last minute, to two places."""
    return round(os.getloadavg()[0], 2)


def loaded(record: Record) -> str | None:
    """The sentence about a machine that did other work when the benchmark began, or None."""
    if record.load <= QUIET * record.machine.cores:
        return None
    return (
        f"the machine was loaded (load average {record.load:g} on {record.machine.cores} cores): times are too long, "
        "and ratios are the better figure."
    )


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def record_text(record: Record) -> str:
    return record.model_dump_json(indent=1) + "\n"


def check_place(path: Path, option: str) -> None:
    """Before anything is measured. Raises UserError where the file that `option` names cannot be written."""
    if path.is_dir():
        raise UserError(f"{option} {path} cannot be written: it is a folder.")
    try:
        draft = draft_of(path)
        draft.touch(exist_ok=False)
        draft.unlink()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}.") from None


def write(record: Record, path: Path) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        replace_text(path, record_text(record))
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}.") from None


def read(path: Path) -> Record:
    """The record that `write` wrote.

    Raises:
        UserError: there is none, or the file is something else.
    """
    text = read_text(path.parent, path.name)
    try:
        return Record.model_validate(json.loads(text))
    except ValidationError as error:
        raise UserError(f"{path} is no result of `toolkit bench`: {explain(error, Record)}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON.") from None


def ratios(samples: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Spread]:
    """By name, the times over those of `baseline`, round by round: what slows a round down slows both."""
    base = samples[baseline]
    return {
        name: Spread.of([own / other for own, other in zip(values, base, strict=True)])
        for name, values in samples.items()
    }
