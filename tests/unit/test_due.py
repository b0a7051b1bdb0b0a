"""At which steps a run saves: never more than the interval is at risk. In a real run: `test_steps_behind.py`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.run.saving import Due


def saves(every: int, took: list[int], *, keep_every: int = 0, start: int = 0, steps: int = 400) -> list[int]:
    """The steps that are saved when writing takes as many steps as `took` says, in turn; checks what is at risk."""
    due, begun, newest, ready = Due(every, keep_every, start), list[int](), start, 0
    for step in range(start + 1, start + steps + 1):
        if begun and newest != begun[-1] and step > ready:  # written, which ranks notice at different steps
            newest = begun[-1]
        assert step - newest <= every, f"in step {step} that of {newest} is the newest"
        at = due.at(step)
        if at and due.writing:
            due.ended(ready - begun[-1])
            newest = begun[-1]
        if at:
            due.begun(step, newest)
            begun.append(step)
            ready = step + took[(len(begun) - 1) % len(took)]
        if due.late(step):
            due.ended(ready - begun[-1])
            newest = begun[-1]
    assert begun or steps < every
    return begun


def test_a_tenth_earlier_or_as_early_as_writing_takes() -> None:
    assert saves(100, [1]) == [90, 180, 270, 360]
    assert saves(100, [10]) == [90, 180, 270, 360]
    assert saves(100, [25]) == [90, 140, 210, 280, 350]
    assert saves(100, [1000]) == [90, 120, 180, 240, 300, 360]
    assert saves(100, [1], start=95) == [180, 270, 360, 450]


def test_below_ten_training_waits_and_every_multiple_is_saved() -> None:
    assert saves(4, [3], steps=12) == [4, 8, 12]
    assert saves(1, [1], steps=3) == [1, 2, 3]
    assert saves(4, [3], start=7, steps=10) == [8, 12, 16]


@pytest.mark.parametrize("keep_every", [30, 250, 1000])
def test_what_is_to_be_kept_is_saved(keep_every: int) -> None:
    assert set(range(keep_every, 2001, keep_every)) <= set(saves(100, [7, 30], keep_every=keep_every, steps=2000))


@given(
    every=st.integers(1, 60),
    took=st.lists(st.integers(0, 80), min_size=1, max_size=9),
    keep_every=st.integers(0, 50),
    start=st.integers(0, 100),
)
def test_no_more_than_the_interval_is_ever_at_risk(every: int, took: list[int], keep_every: int, start: int) -> None:
    saves(every, took, keep_every=keep_every, start=start)
