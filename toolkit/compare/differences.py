"""How far apart methods are: means and spreads over seeds, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """A method's loss minus the baseline's.

    Attributes:
        by_seed: at each seed that both have.
        mean: of these; with no seed in common, the difference of the means.
        standard_error: of that mean, from the spread of the paired differences; None with fewer than two.
        spread: standard deviation of a run of one method over seeds, pooled over both; None with fewer than two seeds
            of each.
        in_spreads: the difference of the means / sqrt(1/n1 + 1/n2), in units of `spread`: below 2 it may be chance.
    """

    by_seed: dict[int, float]
    mean: float
    standard_error: float | None
    spread: float | None
    in_spreads: float | None


def spread(losses: Mapping[int, float]) -> float | None:
    """The standard deviation over seeds, of a sample; None for fewer than two."""
    return statistics.stdev(losses.values()) if len(losses) > 1 else None


def difference(mine: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """`mine` against `base`, final losses by seed, all finite; None where either is empty."""
    if not mine or not base:
        return None
    by_seed = {seed: mine[seed] - base[seed] for seed in sorted(mine) if seed in base}
    pairs = list(by_seed.values())
    unpaired = statistics.fmean(mine.values()) - statistics.fmean(base.values())
    pooled = _pooled(mine, base)
    scaled = unpaired / math.sqrt(1 / len(mine) + 1 / len(base))
    return Difference(
        by_seed=by_seed,
        mean=statistics.fmean(pairs) if pairs else unpaired,
        standard_error=statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None,
        spread=pooled,
        in_spreads=scaled / pooled if pooled else None,
    )


def _pooled(mine: Mapping[int, float], base: Mapping[int, float]) -> float | None:
    if len(mine) < 2 or len(base) < 2:
        return None
    squares = sum((len(part) - 1) * statistics.variance(part.values()) for part in (mine, base))
    return math.sqrt(squares / (len(mine) + len(base) - 2))
