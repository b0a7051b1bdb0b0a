"""Numbers that move over the training, or with something that is measured: small objects that rules share."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from torch import Tensor


class Schedule(Protocol):
    """A number by the fraction of the training that is done, 0 at the first step and 1 at the last."""

    def at(self, fraction: float) -> float: ...


def fraction_done(t: int, total_steps: int) -> float:
    """Of the training, at optimizer step t = 1, 2, ...; 1 from the last step on."""
    return min((t - 1) / max(total_steps - 1, 1), 1.0)


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in a straight line."""

    start: float = 1.0
    end: float = 0.0

    def at(self, fraction: float) -> float:
        return self.start + (self.end - self.start) * fraction


@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` as half a cosine."""

    start: float = 1.0
    end: float = 0.0

    def at(self, fraction: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * fraction))


@dataclass(frozen=True)
class Points:
    """(x, value) points with increasing x, joined by straight lines; before the first and after the last it stays."""

    points: tuple[tuple[float, float], ...]

    def at(self, fraction: float) -> float:
        left = self.points[0]
        for right in self.points:
            if fraction <= right[0]:
                span = right[0] - left[0]
                share = (fraction - left[0]) / span if span > 0 else 1.0
                return left[1] + max(share, 0.0) * (right[1] - left[1])
            left = right
        return left[1]

    def of(self, x: Tensor) -> Tensor:
        """The same function of a statistic, inside a rule's `update`: what closes a loop."""
        value = x * 0.0 + self.points[0][1]
        for left, right in zip(self.points, self.points[1:], strict=False):
            slope = (right[1] - left[1]) / (right[0] - left[0])
            value = value + slope * (x.clamp(left[0], right[0]) - left[0])
        return value


SHAPES: dict[str, type[Linear | Cosine]] = {"linear": Linear, "cosine": Cosine}

Setting = str | float | tuple[str, float, float] | tuple[tuple[float, float], ...]
"""As a JSON says it: "linear" or "cosine" (1 to 0), one of them with its ends (["cosine", 1.5, 1]), a constant, or
points."""


def check_setting(value: Any, name: str, *, most: float = 1.0, words: Sequence[str] = ()) -> Setting:
    """`value` as a Setting, unless it is one of `words`.

    Raises ValueError, which says what is allowed, unless all numbers are in [0, `most`]; fractions are in [0, 1].
    """
    within = f"in [0, {most:g}]" if most < math.inf else "of 0 or more"
    allowed = (
        f'must be {", ".join(map(repr, (*words, *SHAPES)))}, a shape with its ends (["cosine", 1, 0.5]), a number '
        f"{within} or a list of (fraction, value) points {within}"
    )

    def is_number(given: Any) -> bool:
        known = isinstance(given, (int, float)) and not isinstance(given, bool)
        return known and abs(given) <= sys.float_info.max

    def number(given: Any) -> float:
        if not is_number(given) or not 0.0 <= given <= most:
            raise ValueError(allowed)
        return float(given)

    if isinstance(value, str):
        if value not in (*words, *SHAPES):
            raise ValueError(allowed)
        return value
    if not isinstance(value, (list, tuple)):
        return number(value)
    if len(value) == 3 and isinstance(value[0], str) and value[0] in SHAPES:
        return value[0], number(value[1]), number(value[2])
    points = []
    for point in value:
        if not isinstance(point, (list, tuple)) or len(point) != 2 or not all(map(is_number, point)):
            raise ValueError(allowed)
        points.append((float(point[0]), float(point[1])))
    fractions = [fraction for fraction, _ in points]
    inside = all(0.0 <= x <= 1.0 and 0.0 <= level <= most and level < math.inf for x, level in points)
    if not points or not inside or any(a >= b for a, b in zip(fractions, fractions[1:], strict=False)):
        raise ValueError(f"{name}'s points must be {within} with fractions that increase, not {points!r}")
    return tuple(points)


def moves(setting: Any) -> bool:
    """Whether a checked setting is none that is the same at every step."""
    return isinstance(setting, (str, tuple))


def schedule(setting: Setting) -> Schedule:
    """What a checked setting says."""
    if isinstance(setting, str):
        return SHAPES[setting]()
    if not isinstance(setting, tuple):
        return Linear(setting, setting)
    if isinstance(setting[0], str):
        return SHAPES[setting[0]](*setting[1:])
    return Points(setting)


def value_at(setting: Setting, t: int, total_steps: int | None) -> float:
    """What a checked setting says at optimizer step t = 1, 2, ...; after `total_steps` it holds its last value."""
    if not isinstance(setting, (str, tuple)):
        return setting
    assert total_steps is not None
    return schedule(setting).at(fraction_done(t, total_steps))


def between(start: float, end: float, setting: Setting, t: int, total_steps: int | None) -> float:
    """`start` where the setting is 1, `end` where it is 0, and a mixture of both in between."""
    share = value_at(setting, t, total_steps)
    return share * start + (1.0 - share) * end


@lru_cache(maxsize=1024)  # each step's is asked for by every tensor
def product_between(start: float, end: float, setting: Setting, t: int, total_steps: int | None) -> float:
    """`between` at the steps 1 to t, multiplied, as far as that is not zero beside 1."""
    left = 1.0
    for index in range(1, t + 1):
        left *= between(start, end, setting, index, total_steps)
        if left < 1e-18:
            break
    return left
