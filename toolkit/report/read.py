"""Reads a run's folder as it is: whatever is missing or damaged becomes a `Problem`, never an exception."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from toolkit.errors import UserError, nearest
from toolkit.masking import masked
from toolkit.paths import read_text
from toolkit.printable import printable, printable_tree
from toolkit.records.activations import Written, renamed
from toolkit.records.memory import FOLDER, PREDICTED, Measurement, OutOfMemoryRecord, Prediction, Timeline
from toolkit.records.run import CONFIG, METRICS, METRICS_LIMIT, RUN, SUMMARY, read_metrics
from toolkit.report.data import Explanation, Problem, Topic

_RANK = re.compile(r"rank(\d+)\.json")
_OUT_OF_MEMORY = re.compile(r"rank(\d+)-out-of-memory\.(json|md)")
_DIGITS = 18
_FP32_MAX = 3.4028235e38
_Count = Annotated[int, Field(ge=0, le=10**_DIGITS)]
_Load = Annotated[float, Field(ge=0, le=_FP32_MAX)]
_Model = TypeVar("_Model", bound=BaseModel)


class _Written(BaseModel):
    """A file of the training loop: fields that a report has no use for may come and go."""

    model_config = ConfigDict(extra="ignore")


class Settings(_Written):
    model: str | None = None
    data: str | None = None
    data_subset: str | None = None
    tokenizer: str | None = None
    steps: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    activations: Written | None = None
    loss: str | None = None

    _of_older_versions = model_validator(mode="before")(renamed)


class RunFile(_Written):
    """run.json."""

    started: str | None = None
    settings: Settings = Settings()
    world_size: int | None = None
    micro_batch: int | None = None
    gradient_accumulation: int | None = None
    global_batch: int | None = None
    parameters: int | None = None
    device: str | None = None
    ds_config: dict[str, Any] = {}
    versions: dict[str, str] = {}


class SummaryFile(_Written):
    """summary.json."""

    interrupted: bool = False
    peak_memory_bytes: int | None = None
    memory_kind: str = ""
    forward_seconds: list[_Load] = []
    """Of a step, by rank: what it takes for its forward passes, and waits for their data."""


class Routers(_Written):
    """Of each layer of experts; `toolkit/run/routers.py` says what."""

    layers: list[str]
    busiest: list[_Load]
    idlest: list[_Load]
    evenness: list[_Load]
    unused: list[_Count]

    @model_validator(mode="after")
    def _whole(self) -> Routers:
        if len({len(self.layers), len(self.busiest), len(self.idlest), len(self.evenness), len(self.unused)}) != 1:
            raise ValueError("not as many of each as there are layers")
        return self


class StepLine(_Written):
    """A line of metrics.jsonl."""

    step: _Count
    loss: float | None
    tokens_per_s: float | None = None
    step_time_s: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    data_seconds: float | None = None
    flops_per_s: float | None = None
    mfu: float | None = None
    sequences: _Count | None = None
    tokens: _Count | None = None
    changed: list[str] = []
    compile_s: float = 0.0
    memory_bytes: _Count | None = None
    skipped: bool = False
    val_loss: float | None = None
    routers: Routers | None = None
    nonfinite: list[str] = []

    def seen(self) -> int | None:
        """Tokens of this step; older versions wrote only speed and time."""
        if self.tokens is not None or self.tokens_per_s is None or self.step_time_s is None:
            return self.tokens
        seen = self.tokens_per_s * self.step_time_s
        return round(seen) if 0 <= seen < 10**_DIGITS else None


@dataclass
class Folder:
    """What could be read of a run."""

    path: Path
    run: RunFile | None = None
    summary: SummaryFile | None = None
    steps: list[StepLine] = field(default_factory=list)
    predicted: Prediction | None = None
    measured: dict[int, Measurement] = field(default_factory=dict)
    out_of_memory: list[Explanation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def note(self, part: Topic, sentence: str) -> None:
        self.problems.append(Problem(part=part, sentence=sentence))


def read_folder(path: Path) -> Folder:
    """Read the run in `path`.

    Raises:
        UserError: there is no such folder, or nothing of a run in it.
    """
    _check(path)
    folder = Folder(path)
    _read_training(folder)
    if not (path / FOLDER).is_dir():
        folder.note("measurement", f"There is no folder {FOLDER}/: neither a prediction nor a measurement was kept.")
        return folder
    _read_memory(folder)
    return folder


def _holds_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (RUN, METRICS, SUMMARY)) or any((path / FOLDER).glob("*.json"))


def _check(path: Path) -> None:
    expected = f"expected are {RUN} and {METRICS}, or {FOLDER}/*.json"
    try:
        if path.is_file():
            raise UserError(f"{path} is a file, but a report is made of a run's folder; {expected} in it.")
        if not path.is_dir():
            others = [other.name for other in path.absolute().parent.glob("*") if other.is_dir() and _holds_run(other)]
            raise UserError(f"there is no run folder {path}; {expected} in it.{nearest(path.name, others)}")
        if _holds_run(path):
            return
        inside = sorted(other.name for other in path.iterdir() if other.is_dir() and _holds_run(other))
        beside = [other.name for other in path.absolute().parent.iterdir() if other.is_dir() and _holds_run(other)]
    except OSError as error:
        raise UserError(f"the run folder {path} cannot be read: {error.strerror}.") from None
    hint = f" Runs are in its folders {', '.join(map(repr, inside[:5]))}." if inside else nearest(path.name, beside)
    raise UserError(f"the folder {path} holds no run; {expected}.{hint}")


def _read_training(folder: Folder) -> None:
    path = folder.path
    folder.run = _load(folder, "run", RUN, RunFile)
    if folder.run is not None and not folder.run.ds_config and (path / CONFIG).is_file():
        folder.run.ds_config = _load_object(folder, "run", CONFIG) or {}
    if (path / METRICS).is_file():
        _read_metrics(folder)
    elif folder.run is not None:
        folder.note("training", f"There is no {METRICS}: nothing is known of the steps.")
    folder.summary = _load(folder, "training", SUMMARY, SummaryFile)


def _read_metrics(folder: Folder) -> None:
    try:
        text = read_text(folder.path, METRICS, limit=METRICS_LIMIT)
        records, lines = read_metrics(folder.path / METRICS), len(text.splitlines())
    except UserError as error:
        folder.note("training", f"{METRICS} is damaged: {error}.")
        return
    for number, record in enumerate(records, 1):
        try:
            line = StepLine.model_validate(_finite(printable_tree(record)))
        except (ValidationError, RecursionError) as error:
            folder.note("training", f"Line {number} of {METRICS} is not a step: {_why(error)}.")
            continue
        folder.steps.append(line)
    if len(records) < lines:
        folder.note(
            "training",
            f"{METRICS} breaks off in line {len(records) + 1} of {lines}; the {len(records)} before it are whole.",
        )


def _read_memory(folder: Folder) -> None:
    predicted = _load(folder, "prediction", f"{FOLDER}/{PREDICTED}", Prediction)
    if predicted is not None and _consistent(folder, "prediction", PREDICTED, predicted.timeline):
        folder.predicted = predicted
    elif not (folder.path / FOLDER / PREDICTED).exists():
        folder.note("prediction", f"There is no {FOLDER}/{PREDICTED}: nothing to compare the measurement with.")
    paths = sorted((folder.path / FOLDER).iterdir())
    for path in paths:
        if match := _RANK.fullmatch(path.name):
            measured = _load(folder, "measurement", f"{FOLDER}/{path.name}", Measurement)
            if measured is not None:
                if measured.timeline and not _consistent(folder, "measurement", path.name, measured.timeline):
                    measured.timeline = None
                folder.measured[int(match[1])] = measured
        elif (match := _OUT_OF_MEMORY.fullmatch(path.name)) and match[2] == "json":
            record = _load(folder, "out of memory", f"{FOLDER}/{path.name}", OutOfMemoryRecord)
            if record is not None:
                folder.out_of_memory.append(Explanation(rank=int(match[1]), record=record))
    explained = {explanation.rank for explanation in folder.out_of_memory}
    for path in paths:
        match = _OUT_OF_MEMORY.fullmatch(path.name)
        if match and match[2] == "md" and int(match[1]) not in explained and path.is_file():
            try:
                text = printable(read_text(folder.path, f"{FOLDER}/{path.name}"), lines=True)
            except UserError as error:
                folder.note("out of memory", f"{FOLDER}/{path.name} is damaged: {error}.")
                continue
            folder.out_of_memory.append(Explanation(rank=int(match[1]), record=None, text=text))


def _consistent(folder: Folder, part: Topic, name: str, timeline: Timeline) -> bool:
    """Whether a timeline can be drawn: a size for every category at every sample, and times in order."""
    times = timeline.milliseconds
    lengths = {len(values) for values in timeline.held.values()} | ({len(times)} if times is not None else set())
    ordered = times is None or all(before <= after for before, after in pairwise(times))
    if len(lengths) <= 1 and ordered and all(size >= 0 for values in timeline.held.values() for size in values):
        return True
    folder.note(
        part, f"{FOLDER}/{name} is damaged: its timeline lacks samples, runs backwards or holds less than nothing."
    )
    return False


def _load(folder: Folder, part: Topic, name: str, model: type[_Model]) -> _Model | None:
    content = _load_object(folder, part, name)
    if content is None:
        return None
    try:
        return model.model_validate(content)
    except (ValidationError, RecursionError) as error:
        folder.note(part, f"{name} is damaged: {_why(error)}.")
        return None


def _load_object(folder: Folder, part: Topic, name: str) -> dict[str, Any] | None:
    if not os.path.lexists(folder.path / name):
        return None
    try:
        text = read_text(folder.path, name)
        content = json.loads(text, parse_int=_whole, parse_float=_real, parse_constant=_real)
        # JSON can spell halves of characters, which no file of ours could hold.
        json.dumps(content, ensure_ascii=False).encode()
        content = printable_tree(masked(content))
    except (ValueError, RecursionError) as error:  # a UserError, too
        folder.note(part, f"{name} is damaged: {_why(error)}.")
        return None
    if not isinstance(content, dict):
        folder.note(part, f"{name} is damaged: it is not one JSON object.")
        return None
    return content


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"the number {text[:_DIGITS]}... is too large")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not abs(value) <= _FP32_MAX:
        raise ValueError(f"the number {text[:_DIGITS]} is not finite")
    return value


def _finite(record: Any) -> Any:
    """A line of the metrics with None for each number that is none in fp32."""
    if not isinstance(record, Mapping):
        return record
    return {
        key: None if isinstance(value, float) and not abs(value) <= _FP32_MAX else value
        for key, value in record.items()
    }


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON from line {error.lineno}, column {error.colno} on"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text from byte {error.start} on"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"]) or "it"
        return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}"
    if isinstance(error, OSError):
        return f"{(error.strerror or 'it cannot be read').lower()}"
    if isinstance(error, UnicodeEncodeError):
        return "it holds half a character"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
