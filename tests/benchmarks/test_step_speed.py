"""The compiled 8-bit step against bitsandbytes on a CPU, a ratio taken in one run."""

from __future__ import annotations

from step_speed import contenders, measure, measure_in_turn, weight_contenders


def test_amcs_step_is_20_times_as_fast_as_ademamix8bit() -> None:
    """By the best of several steps each, which other work on the machine disturbs least."""
    made = contenders()
    ours = min(measure(made["AMCS 8bit"], 8 * 2**20, "cpu", repeats=10))
    theirs = min(measure(made["bitsandbytes AdEMAMix8bit"], 8 * 2**20, "cpu", repeats=4))
    assert theirs > 20 * ours, f"AMCS 8bit {ours:.1f} ms, AdEMAMix8bit {theirs:.1f} ms"


def test_remainders_cost_no_more_than_a_master_copy() -> None:
    found = measure_in_turn(weight_contenders(8 * 2**20, "cpu"), "cpu", repeats=5)
    base = found["AMCS 8bit, fp32 weights"]
    assert found["AMCS 8bit, bf16+8 weights"] < 1.15 * base, found
