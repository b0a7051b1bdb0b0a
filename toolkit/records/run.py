"""The files of a run's folder, by name, and the lines of metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from toolkit.paths import read_text

RUN, CONFIG, METRICS, SUMMARY, PLOT = (
    "run.json",
    "ds_config.json",
    "metrics.jsonl",
    "summary.json",
    "loss.png",
)
CHECKPOINTS = "checkpoints"
EVENTS = "tensorboard"
LAST_STEPS = 10
"""Steps whose mean is the final training loss: a single batch is too noisy to report."""
METRICS_LIMIT = 1 << 30
"""Bytes of a metrics.jsonl: three million steps."""


def strict(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` as strict JSON allows it: NaN and infinities become null, and `nonfinite` names them."""
    bad = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    clean = {key: None if key in bad else value for key, value in record.items()}
    return {**clean, "nonfinite": bad} if bad else clean


class MetricsLine(BaseModel):
    """A line of metrics.jsonl, as far as a resumed run relies on it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    step: Annotated[int, Field(ge=1)]
    loss: float | None
    tokens_per_s: Annotated[float, Field(ge=0)]
    step_time_s: Annotated[float, Field(ge=0)]
    skipped: bool
    val_loss: float | None = None
    compile_s: float = 0.0


def is_step_line(record: Any) -> bool:
    try:
        MetricsLine.model_validate(record)
        json.dumps(record, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


CUT = object()
"""In place of a line that is no JSON."""


def parse_metrics(path: Path) -> list[Any]:
    records: list[Any] = []
    for line in read_text(path.parent, path.name, limit=METRICS_LIMIT, errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            records.append(CUT)
    return records


def read_metrics(path: Path) -> list[Any]:
    """The records of a metrics.jsonl up to a line that is no JSON; a crash cuts the last one short.

    Raises:
        UserError: it cannot be read, or is a link out of its folder.
    """
    return list(takewhile(lambda record: record is not CUT, parse_metrics(path)))


def tokens_of(record: Mapping[str, Any]) -> int:
    """Tokens of a step's record; of one without `tokens`, which older versions wrote, from speed and time."""
    noted = record.get("tokens")
    return int(noted) if noted is not None else round(record["tokens_per_s"] * record["step_time_s"])
