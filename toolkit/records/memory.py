"""What a run's folder says of memory: one model for predictions, measurements and reports.

Files, all in ``<run>/memory``: predicted.json (`Prediction`), rank<n>.json (`Measurement`, one a rank) and, of a traced
step, rank<n>-snapshot.pickle; where memory ran out rank<n>-out-of-memory.md, .json (`OutOfMemoryRecord`) and .pickle.
All sizes are bytes of one rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from toolkit.paths import replace_text
from toolkit.records.activations import Written, renamed
from toolkit.records.categories import in_order

FOLDER = "memory"
BESIDE = "libraries that load later, and freed memory that the C library keeps"
"""What a resident set holds beside the process as it was before the model, and what the model and its steps hold."""
PREDICTED = "predicted.json"


def measured_name(rank: int) -> str:
    return f"rank{rank}.json"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Phase(Record):
    """The peak of one phase of a step."""

    name: str
    """One of `categories.PHASES`."""
    peak: int | None
    """Allocated bytes at the peak; None where only the resident set is known (summary on a CPU)."""
    held: dict[str, int] = {}
    """The same by category; sums to `peak`. Empty where categories were not measured."""
    resident_set: int | None = None
    """Largest resident set of the process in this phase (CPU), or reserved bytes (GPU)."""


class Span(Record):
    """A phase as a part of a timeline: samples `start` to `stop`, without the latter."""

    name: str
    start: int
    stop: int


class Timeline(Record):
    """Held bytes over one training step, sampled where they changed most; the peak is always among the samples."""

    milliseconds: list[float] | None
    """Since the step began; None for a prediction, whose samples are in order but have no time."""
    spans: list[Span]
    held: dict[str, list[int]]
    """By category, one value a sample."""


class LargeTensor(Record):
    """One of the largest tensors at the peak."""

    bytes: int
    category: str
    what: str
    """A parameter's name, a state's key, or the operation that made it."""
    where: str
    """File, line and function, or the operation of the backward pass; empty for what was there before the step."""
    phase: str
    """In which it was allocated; "init" for what was there before the step."""


class Allocator(Record):
    """The caching allocator of a GPU at the end of the latest step."""

    allocated: int
    reserved: int
    largest_free_block: int
    fragmentation: float
    """Share of the reserved bytes that is not allocated."""


class Change(Record):
    """What one changed setting would do to the peak."""

    change: str
    """The setting, as a user would write it: `zero_optimization.stage 3`, `--micro-batch 2`."""
    peak: int
    saves: int
    """Bytes below the peak that it is compared with; negative where more is held."""


class Setup(Record):
    """What a prediction or measurement is of."""

    model: str
    parameters: int
    optimizer: str
    stage: int
    state_format: str
    weights: str
    """"bf16+8", "bf16", ...; "fp32" where master weights are kept or the model is fp32."""
    offload: list[str] = []
    world_size: int
    micro_batch: int
    gradient_accumulation: int
    seq_len: int
    activations: Written
    attention: str
    loss: str
    device: Literal["cpu", "cuda"]

    _of_older_versions = model_validator(mode="before")(renamed)


class Prediction(Record):
    """What `toolkit estimate` computes for the largest rank."""

    setup: Setup
    peak: int
    peak_phase: str
    phases: list[Phase]
    timeline: Timeline
    resident: dict[str, int]
    """Between steps, by category."""
    host: dict[str, int] = {}
    """In host memory, by category, where something is offloaded."""
    nvme: dict[str, int] = {}
    """On NVMe, by category."""
    sent: int = 0
    """Bytes that this rank sends in a step for whole matrices, beside gradients and weights."""
    wire: dict[str, int] | None = None
    """Bytes that this rank puts into collectives in a step for gradients and weights, by kind; None: not known."""
    context: int = 0
    """Outside torch's allocator, on top of `peak` (CUDA context); 0 on a CPU."""
    per_block: dict[str, int] = {}
    """Activations of one transformer block: "kept" between its forward and backward pass, "largest moment" in it."""
    changes: list[Change] = []
    remarks: list[str] = []

    @property
    def needed(self) -> int:
        """Bytes of the device at the peak, the context included."""
        return self.peak + self.context

    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the peak."""
        return _held_in(self.peak_phase, self.phases)


class Measurement(Record):
    """What one rank held, measured."""

    setup: Setup
    rank: int
    host: str
    device_name: str
    level: Literal["summary", "full"]
    source: str
    """Where the numbers come from, in words: "torch's CPU allocator", "resident set", "CUDA caching allocator"."""
    step: int | None
    """The training step that was traced (full), from 1."""
    peak: int | None
    """Largest of all steps' `phases`; None where only the resident set is known."""
    peak_phase: str | None
    phases: list[Phase]
    resident: dict[str, int]
    """Between steps, by category, with "other" for what has no name; without it in a summary on a CPU."""
    host_memory: dict[str, int] = {}
    """In host memory between steps, by category, where something is offloaded from a GPU."""
    limit: int | None = None
    """Bytes this process may have, where known."""
    timeline: Timeline | None = None
    blocks: list[LargeTensor] = []
    allocator: Allocator | None = None
    largest_resident_set: int | None = None
    """Peak resident set of the process over the whole run (CPU)."""
    process: int | None = None
    """Bytes of the process before there was a model: Python and libraries (CPU)."""
    overhead_seconds: float
    """What measuring has cost in all, and `steps` it was spread over."""
    steps: int

    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the peak; empty where categories were not measured."""
        return _held_in(self.peak_phase, self.phases)


def _held_in(phase: str | None, phases: Iterable[Phase]) -> dict[str, int]:
    return in_order(next((one.held for one in phases if one.name == phase), {}))


class OutOfMemoryRecord(Record):
    """What was held when an allocation failed."""

    setup: Setup | None
    rank: int
    phase: str
    step: int | None
    asked: int | None
    """Bytes of the allocation that failed, where the message says so."""
    limit: int | None
    """Bytes this process may have, where known."""
    held: dict[str, int]
    blocks: list[LargeTensor] = []
    changes: list[Change] = []
    message: str


def write_record(folder: Path, name: str, record: Record) -> Path:
    """Write `record` into the run folder's memory folder, whole or not at all."""
    path = folder / FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, record.model_dump_json(indent=1) + "\n")
    return path
