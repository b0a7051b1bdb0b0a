"""What the report of a comparison says: one model that the page, the Markdown and the JSON are written from.

Losses are nats per token, sizes bytes of the largest rank. None is "not known".
"""

from __future__ import annotations

from typing import Any

from toolkit.records.memory import Record


class SweepResult(Record):
    """One sweep of a method, at seed 0."""

    key: str
    losses: dict[str, float | None]
    """By value; None where the run has not ended or diverged (`diverged` names those)."""
    diverged: list[str]
    verdict: str
    """Where the best value is, as `toolkit.compare.tuning.Verdict` has it."""
    factor: float | None
    """The larger factor between the best value and its neighbours."""


class Curve(Record):
    """Training loss over steps, at the best values: the mean over seeds in each of some equal parts of the run."""

    steps: list[int]
    loss: list[float | None]


class Difference(Record):
    """Final validation loss minus the baseline's; `toolkit.compare.differences.Difference` says how."""

    by_seed: dict[int, float]
    mean: float
    standard_error: float | None
    spread: float | None
    in_spreads: float | None
    curve: Curve | None
    """Of the training loss, paired step by step at the seeds that both have."""


class MethodResult(Record):
    """One line of the table."""

    name: str
    origin: str
    best: dict[str, float]
    """The swept keys at their best values."""
    tuned: bool
    why_untuned: str | None
    """In half a sentence."""
    losses: dict[int, float]
    """Final validation loss at the best values, by seed."""
    mean: float | None
    spread: float | None
    """Standard deviation over seeds."""
    difference: Difference | None
    peak: int | None
    peak_kind: str | None
    state_per_parameter: float | None
    """Bytes of optimizer state, of all ranks together, master weights included."""
    tokens_per_s: float | None
    """Median step, mean over seeds."""
    sweeps: list[SweepResult]
    curve: Curve | None
    runs: list[str]
    """Folders of the runs at the best values, in the comparison's folder."""
    command: str
    """Of the first of them."""
    config: dict[str, Any]
    """The DeepSpeed JSON as that run used it."""


class ComparisonReport(Record):
    """A whole comparison, as far as it has got."""

    title: str
    headline: str
    setting: str
    """What all runs share, in a sentence."""
    notes: list[str]
    """What makes a comparison unfair or unfinished, a sentence each."""
    baseline: str
    methods: list[MethodResult]
    settings: dict[str, Any]
    ranks: int
    leanstate: str
