"""Which runs a method needs next: its sweep at the first seed, then the other seeds at the best values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from toolkit.compare.plan import Point, Sweep

Verdict = Literal["inside", "lowest", "highest", "one value", "not finished", "diverged"]
_EXTENDED = ("lr", "weight_decay")
"""Last parts of the keys whose sweep goes on beyond its ends: rates, on a scale of factors."""
_DIGITS = 3

Losses = Callable[[Point, int], float | None]
"""The final validation loss at a point and a seed: infinite where the run diverged, None where it has not ended."""


@dataclass(frozen=True)
class Swept:
    """One sweep: the loss of each value, None where it has not been measured."""

    key: str
    losses: dict[float, float | None]
    verdict: Verdict
    """Where the lowest loss is."""
    step: float | None
    """The larger factor between the best value and its neighbours; None without neighbours, or beside 0."""


@dataclass(frozen=True)
class Tuning:
    """How far a method is, and what it needs next.

    Attributes:
        point: the best values, of those that are known.
        wanted: points and seeds to run now, all independent of each other.
        sweeps: what is known of each sweep, the first one first.
    """

    point: Point
    wanted: list[tuple[Point, int]]
    sweeps: list[Swept]

    @property
    def tuned(self) -> bool:
        """Something is swept, and every best value lies inside its sweep."""
        return bool(self.sweeps) and all(sweep.verdict == "inside" for sweep in self.sweeps)

    @property
    def chosen(self) -> bool:
        """The sweeps are complete."""
        return all(sweep.verdict not in ("not finished", "diverged") for sweep in self.sweeps)


def tune(sweeps: Sequence[Sweep], seeds: int, extend: int, losses: Losses) -> Tuning:
    """The state of a method by the losses that are known.

    Sweeps are made one after another, each at the best values of those before it, and all at seed 0. One whose best
    value is its first or last gets one more value beyond that, by the same factor, up to `extend` times.
    """
    point: Point = ()
    found: list[Swept] = []
    for sweep in sweeps:
        swept = _sweep(sweep, point, extend, losses)
        found.append(swept)
        known = {value: loss for value, loss in swept.losses.items() if loss is not None}
        missing = [value for value, loss in swept.losses.items() if loss is None]
        if known:
            best = min(known, key=lambda value: known[value])
        if missing or math.isinf(known[best]):
            wanted = [((*point, (sweep.key, value)), 0) for value in missing]
            return Tuning((*point, (sweep.key, best)) if known else point, wanted, found)
        point = (*point, (sweep.key, best))
    return Tuning(point, [(point, seed) for seed in range(seeds) if losses(point, seed) is None], found)


def _sweep(sweep: Sweep, before: Point, extend: int, losses: Losses) -> Swept:
    values = sorted(set(sweep.values))
    for extension in range(extend + 1):
        measured = {value: losses((*before, (sweep.key, value)), 0) for value in values}
        known = {value: loss for value, loss in measured.items() if loss is not None}
        if len(known) < len(measured):
            return Swept(sweep.key, measured, "not finished", None)
        best = min(values, key=lambda value: known[value])
        more = beyond(values, best) if sweep.key.split(".")[-1] in _EXTENDED else None
        if more is None or extension == extend:
            break
        values = sorted([*values, more])
    return Swept(sweep.key, measured, verdict(values, best, known[best]), _factor(values, best))


def beyond(values: Sequence[float], best: float) -> float | None:
    """The value to add to a sweep whose best is at an end: as far from it as its neighbour, by factor; else None."""
    if len(values) < 2 or best not in (values[0], values[-1]):
        return None
    neighbour = values[1] if best == values[0] else values[-2]
    if best <= 0 or neighbour <= 0:
        return None
    return float(f"{best * best / neighbour:.{_DIGITS}g}")


def verdict(values: Sequence[float], best: float, loss: float) -> Verdict:
    """Where in `values`, ascending, the best one is."""
    if math.isinf(loss):
        return "diverged"
    if len(values) == 1:
        return "one value"
    return "lowest" if best == values[0] else "highest" if best == values[-1] else "inside"


def _factor(values: Sequence[float], best: float) -> float | None:
    place = values.index(best)
    near = [value for value in values[max(0, place - 1) : place + 2] if value != best]
    if not near or best <= 0 or min(near) <= 0:
        return None
    return max(max(best, value) / min(best, value) for value in near)
