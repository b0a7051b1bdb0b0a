"""Numbers that move over the training, or with something that is measured: small objects that rules share."""

from __future__ import annotations

import math
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


ALLOWED = "must be 'linear', 'cosine', a number in [0, 1] or a list of (fraction, value) points in [0, 1]"

Setting = str | float | tuple[tuple[float, float], ...]
"""As a JSON says it: "linear" or "cosine" (1 to 0), a constant, or points."""


def check_setting(value: Any, name: str) -> Setting:
    """`value` as a Setting. Raises ValueError, which names what is set, unless it and all it says lie in [0, 1]."""
    if isinstance(value, str):
        if value not in ("linear", "cosine"):
            raise ValueError(ALLOWED)
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0.0 <= value <= 1.0:
            raise ValueError(ALLOWED)
        return float(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(ALLOWED)
    try:
        points = tuple((float(fraction), float(level)) for fraction, level in value)
    except (TypeError, ValueError):
        raise ValueError(ALLOWED) from None
    fractions = [fraction for fraction, _ in points]
    inside = all(0.0 <= number <= 1.0 for point in points for number in point)
    if not points or not inside or any(a >= b for a, b in zip(fractions, fractions[1:], strict=False)):
        raise ValueError(f"{name}'s points must be in [0, 1] with fractions that increase, not {list(points)!r}")
    return points


def schedule(setting: Setting) -> Schedule:
    """What a checked setting says."""
    if isinstance(setting, tuple):
        return Points(setting)
    if isinstance(setting, str):
        return Linear() if setting == "linear" else Cosine()
    return Linear(setting, setting)


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
