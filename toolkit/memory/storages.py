"""The storages of one training step, each with its lifetime: what a dry run predicts and a trace measures.

Time is counted in allocations and releases, not in seconds: every one is a moment of its own.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np

from toolkit.records import categories as c
from toolkit.records.by_category import LARGEST
from toolkit.records.memory import LargeTensor, Phase, Span, Timeline

HEAD = "head"
"""Name of the scope in which logits are made."""

SAMPLES = 400
"""Of a timeline that is written down, at most."""


@dataclass(slots=True)
class Scope:
    """One call of a block of the model: an embedding, a transformer layer, a norm, the head."""

    name: str
    opened: int
    closed: int | None = None


@dataclass(slots=True)
class Lifetime:
    """Of one storage. `allocated_at` and `freed_at` are moments: -1 is before the first, None not within the step."""

    bytes: int
    allocated_at: int
    freed_at: int | None
    phase: str
    category: str | None = None
    what: str = ""
    where: str = ""
    scope: Scope | None = None
    parameter: int | None = None
    """Number of the parameter whose gradient this is."""
    address: int = 0


@dataclass
class StorageTrace:
    """What was allocated and freed, in order. `now` is the next moment."""

    lifetimes: list[Lifetime] = field(default_factory=list)
    phases: list[tuple[str, int]] = field(default_factory=list)
    """Name and first moment of each phase."""
    scopes: list[Scope] = field(default_factory=list)
    nanoseconds: list[int] | None = None
    """When each moment was; None for what never ran."""
    heads: list[tuple[int, int]] = field(default_factory=list)
    """Of each micro-batch, from the head's first operation to the gradient of its input; open ends are huge."""
    now: int = 0

    @property
    def phase(self) -> str:
        return self.phases[-1][0] if self.phases else c.INIT

    def begin(self, phase: str) -> None:
        self.phases.append((phase, self.now))

    def curve(self) -> Curve:
        """Bytes by category at every moment so far; every storage must have a category."""
        return curve(self.lifetimes, self.now, self.phases)

    def classify(self) -> None:
        """Give every storage that has no category yet the one that its place and lifetime say."""
        backward = [start for name, start in self.phases if name == c.BACKWARD]
        for lifetime in self.lifetimes:
            if lifetime.category is not None:
                continue
            scope = lifetime.scope
            # Of several micro-batches, the backward pass of its own.
            at = bisect.bisect_right(backward, lifetime.allocated_at)
            forward_ends = backward[at] if at < len(backward) else self.now
            ends = forward_ends if scope is None else scope.closed or forward_ends
            outlives = lifetime.freed_at is None or lifetime.freed_at > ends
            after_head = scope is None and any(first <= lifetime.allocated_at <= last for first, last in self.heads)
            if after_head or (scope is not None and scope.name == HEAD):
                lifetime.category = c.LOGITS
            elif lifetime.phase == c.FORWARD or (lifetime.phase == c.BACKWARD and lifetime.scope is not None):
                lifetime.category = c.ACTIVATIONS if outlives else c.TRANSIENTS
            else:
                lifetime.category = c.TRANSIENTS


@dataclass(frozen=True)
class Curve:
    """Bytes at every moment: `by_category[name]` and `total` are int64 [moments]; `changes` are what they change by."""

    changes: dict[str, np.ndarray]
    total: np.ndarray
    phases: Sequence[tuple[str, int]]

    @cached_property
    def by_category(self) -> dict[str, np.ndarray]:
        """Not needed where only the peak is asked for."""
        return {name: change.cumsum() for name, change in self.changes.items()}

    @property
    def peak_at(self) -> int:
        return int(self.total.argmax())

    def at(self, moment: int) -> dict[str, int]:
        """Bytes by category at `moment`, without empty ones."""
        return {name: int(values[moment]) for name, values in self.by_category.items() if values[moment]}

    def phase_at(self, moment: int) -> str:
        return [name for name, start in self.phases if start <= moment][-1]

    def spans(self) -> list[tuple[str, int, int]]:
        """Phases with the moments they begin and end at; those without any left out."""
        ends = [start for _, start in self.phases[1:]] + [len(self.total)]
        return [(name, start, end) for (name, start), end in zip(self.phases, ends, strict=True) if end > start]

    def by_phase(self) -> list[Phase]:
        """The peak of each phase, the phases of one name (micro-batches) together."""
        best: dict[str, int] = {}
        ends = [start for _, start in self.phases[1:]] + [len(self.total)]
        for (name, start), end in zip(self.phases, ends, strict=True):
            # One in which nothing was allocated or freed has what was there before it.
            first = min(start, max(0, end - 1))
            moment = first + int(self.total[first : max(end, first + 1)].argmax())
            if name not in best or self.total[moment] > self.total[best[name]]:
                best[name] = moment
        return [Phase(name=name, peak=int(self.total[at]), held=self.at(at)) for name, at in best.items()]

    def timeline(self, nanoseconds: Sequence[int] | None = None) -> Timeline:
        """At most SAMPLES moments, each the largest of its stretch; `nanoseconds`: when every moment was."""
        chosen: list[int] = []
        spans = []
        for name, start, end in self.spans():
            first = len(chosen)
            count = max(1, min(end - start, round(SAMPLES * (end - start) / len(self.total))))
            for stretch in np.array_split(np.arange(start, end), count):
                chosen.append(int(stretch[self.total[stretch].argmax()]))
            spans.append(Span(name=name, start=first, stop=len(chosen)))
        return Timeline(
            milliseconds=None
            if nanoseconds is None
            else [round((nanoseconds[at] - nanoseconds[0]) / 1e6, 3) for at in chosen],
            spans=spans,
            held={name: [int(values[at]) for at in chosen] for name, values in self.by_category.items()},
        )


def changes(lifetimes: Iterable[Lifetime], moments: int) -> dict[str, np.ndarray]:
    """Bytes that are allocated at each moment, less those that are freed, by category: int64 [moments]."""
    found: dict[str, np.ndarray] = {}
    for lifetime in lifetimes:
        assert lifetime.category is not None
        if lifetime.category not in found:
            found[lifetime.category] = np.zeros(moments, dtype=np.int64)
        change = found[lifetime.category]
        start, end = max(lifetime.allocated_at, 0), lifetime.freed_at
        if start < moments and (end is None or end > start):
            change[start] += lifetime.bytes
            if end is not None and end < moments:
                change[end] -= lifetime.bytes
    return found


def curve(
    lifetimes: Iterable[Lifetime],
    moments: int,
    phases: Sequence[tuple[str, int]],
    others: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Curve:
    """Add up `lifetimes`, all of which have a category, over `moments` moments; `others`: changes of further ones."""
    found = changes(lifetimes, moments)
    for name, change in others.items():
        found.setdefault(name, np.zeros(moments, dtype=np.int64))[: len(change)] += change
    total = sum(found.values(), start=np.zeros(moments, dtype=np.int64)).cumsum()
    return Curve(c.in_order(found), total, phases)


def largest_tensors(lifetimes: Iterable[Lifetime], curve: Curve, moment: int) -> list[LargeTensor]:
    """The largest storages that are alive at `moment`, largest first."""
    alive = (x for x in lifetimes if x.allocated_at <= moment and (x.freed_at is None or x.freed_at > moment))
    return [
        LargeTensor(
            bytes=lifetime.bytes,
            category=lifetime.category or c.OTHER,
            what=lifetime.what,
            where=lifetime.where,
            # What is inside an operation and what the tracker saw alike: from before the step, or of one of its phases.
            phase=c.INIT if lifetime.allocated_at < 0 else curve.phase_at(lifetime.allocated_at),
        )
        for lifetime in heapq.nlargest(LARGEST, alive, key=lambda lifetime: lifetime.bytes)
    ]
