"""The rate that a range test takes from a curve of losses."""

from __future__ import annotations

import math
import random

import pytest

from toolkit.errors import UserError
from toolkit.run.range_test import HIGHEST, LOWEST, STEPS, risen, steepest

RATES = [LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)) for step in range(STEPS)]


def curve(middle: float, noise: float, seed: int, diverges: float = 30.0) -> list[float]:
    """A loss that falls from 8 to 6, fastest at the rate `middle`, and rises from `diverges` times that on."""
    draw = random.Random(seed)
    fall = [8 - 2 / (1 + math.exp(-3 * math.log(rate / middle))) for rate in RATES]
    rise = [max(0.0, math.log(rate / middle / diverges)) for rate in RATES]
    return [one + other + draw.gauss(0, noise) for one, other in zip(fall, rise, strict=True)]


@pytest.mark.parametrize("middle", [3e-5, 1.5e-3, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_the_rate_of_the_steepest_fall_is_found_through_noise(middle: float, seed: int) -> None:
    losses = curve(middle, 0.05, seed)
    seen = next((count for count in range(1, len(losses)) if risen(losses[:count])), len(losses))
    found = steepest(RATES[:seen], losses[:seen])
    assert middle / 1.6 < found < middle * 1.6 and found == float(f"{found:.1e}")
    assert seen > next(place for place, rate in enumerate(RATES) if rate > middle), "not before the fall"


def test_a_test_ends_soon_after_the_loss_rises() -> None:
    losses = curve(1.5e-3, 0.02, 0)
    seen = next(count for count in range(1, len(losses)) if risen(losses[:count]))
    assert 1.5e-3 * 30 < RATES[seen] < 1.5e-3 * 300


@pytest.mark.parametrize("losses", [[8.0] * STEPS, [8.0 + step for step in range(30)], [], [8.0]])
def test_a_loss_that_does_not_fall_has_no_rate(losses: list[float]) -> None:
    with pytest.raises(UserError, match="the loss falls at no rate from 1e-06 to 10; give --lr a number"):
        steepest(RATES[: len(losses)], losses)
    assert risen(losses) == (len(losses) == 30)
