"""The compiled 8-bit step on a CPU against bitsandbytes and against a step with fp32 master weights.

Ratios taken in one run, up to six runs: what the code can do shows in the best of them, what else the machine does in
the others. The bounds hold on every kind of processor; docs/benchmarks has the figures of some.
"""

from __future__ import annotations

import pytest

from toolkit.bench.contenders import read_contenders
from toolkit.bench.shapes import even
from toolkit.bench.step import measure

pytestmark = pytest.mark.alone

RUNS, PARAMETERS, REPEATS = 6, 8 * 2**20, 7


def ratio(name: str, baseline: str) -> float:
    """The step's time over the baseline's, in one run on one tensor."""
    rows = measure(read_contenders([baseline, name]), even(PARAMETERS), "cpu", REPEATS).rows
    return next(row.counted["ratio"] for row in rows if row.name == name)


@pytest.mark.slow
def test_amcs_step_is_10_times_as_fast_as_ademamix8bit() -> None:
    ratios = []
    for _ in range(RUNS):
        ratios.append(ratio("bnb-ademamix8bit:fp32", "amcs:8bit:fp32"))
        if ratios[-1] > 10:
            return
    raise AssertionError(f"AdEMAMix8bit's time over that of AMCS 8bit: {ratios}")


@pytest.mark.slow
def test_remainders_cost_less_than_a_third_of_a_step() -> None:
    ratios = []
    for _ in range(RUNS):
        ratios.append(ratio("amcs:8bit:bf16+8", "amcs:8bit:master"))
        if ratios[-1] < 1.3:
            return
    raise AssertionError(f"time with bf16+8 over that with fp32 master weights: {ratios}")
