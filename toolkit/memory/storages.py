"""One training step as the lives of its storages: what a rehearsal predicts and a trace measures.

Time is counted in births and deaths, not in seconds: every one is a moment of its own.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from toolkit.records import categories as c
from toolkit.records.by_category import BLOCKS
from toolkit.records.memory import Block, Phase, Span, Timeline

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
class Life:
    """One storage. `born` and `died` are moments; born before the first is -1, died None is not within the tape."""

    bytes: int
    born: int
    died: int | None
    phase: str
    category: str | None = None
    what: str = ""
    where: str = ""
    scope: Scope | None = None
    parameter: int | None = None
    """Number of the parameter whose gradient this is."""
    address: int = 0


@dataclass
class Tape:
    """What happened, in order. `now` is the next moment."""

    lives: list[Life] = field(default_factory=list)
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

    def classify(self) -> None:
        """Give every life that has no category yet the one that its place and length say."""
        backward = [start for name, start in self.phases if name == c.BACKWARD]
        for life in self.lives:
            if life.category is not None:
                continue
            scope = life.scope
            # Of several micro-batches, the backward pass of its own.
            at = bisect.bisect_right(backward, life.born)
            forward_ends = backward[at] if at < len(backward) else self.now
            ends = forward_ends if scope is None else scope.closed or forward_ends
            outlives = life.died is None or life.died > ends
            after_head = scope is None and any(first <= life.born <= last for first, last in self.heads)
            if after_head or (scope is not None and scope.name == HEAD):
                life.category = c.LOGITS
            elif life.phase == c.FORWARD or (life.phase == c.BACKWARD and life.scope is not None):
                life.category = c.ACTIVATIONS if outlives else c.TRANSIENTS
            else:
                life.category = c.TRANSIENTS


@dataclass(frozen=True)
class Curve:
    """Bytes held at every moment, by category: `held[name]` is int64 [moments]."""

    held: dict[str, np.ndarray]
    total: np.ndarray
    phases: Sequence[tuple[str, int]]

    @property
    def peak_at(self) -> int:
        return int(self.total.argmax())

    def at(self, moment: int) -> dict[str, int]:
        """Bytes by category at `moment`, without empty ones."""
        return {name: int(values[moment]) for name, values in self.held.items() if values[moment]}

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
            # One in which nothing was allocated or freed holds what was there before it.
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
            held={name: [int(values[at]) for at in chosen] for name, values in self.held.items()},
        )


def curve(lives: Iterable[Life], moments: int, phases: Sequence[tuple[str, int]]) -> Curve:
    """Add up `lives`, all of which have a category, over `moments` moments."""
    changes: dict[str, np.ndarray] = {}
    for life in lives:
        assert life.category is not None
        if life.category not in changes:
            changes[life.category] = np.zeros(moments + 1, dtype=np.int64)
        change = changes[life.category]
        born = max(life.born, 0)
        died = moments if life.died is None else min(life.died, moments)
        if died > born:
            change[born] += life.bytes
            change[died] -= life.bytes
    held = {name: changes[name].cumsum()[:moments] for name in c.ordered(changes)}
    total = np.sum(list(held.values()), axis=0) if held else np.zeros(moments, dtype=np.int64)
    return Curve(held, total, phases)


def blocks_at(lives: Iterable[Life], curve: Curve, moment: int) -> list[Block]:
    """The largest storages that are alive at `moment`, largest first."""
    alive = (life for life in lives if life.born <= moment and (life.died is None or life.died > moment))
    return [
        Block(
            bytes=life.bytes,
            category=life.category or c.OTHER,
            what=life.what,
            where=life.where,
            # "inside" an operation and what the tracker saw alike: born before the step, or in one of its phases.
            phase=c.INIT if life.born < 0 else curve.phase_at(life.born),
        )
        for life in heapq.nlargest(BLOCKS, alive, key=lambda life: life.bytes)
    ]
