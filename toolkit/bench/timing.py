"""How long calls take, on a CPU and on a GPU, each in its turn: A B C A B C ..."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

WARM = 2
"""Rounds that are not timed: the first compiles and allocates."""
QUEUED = 10
"""Calls of a sample on a GPU: they follow one another without waiting, so that the host's share does not show."""

LARGEST_COPY = 2**30
"""Bytes: far more than any cache has."""

Call = Callable[[], object]


class Sample(NamedTuple):
    """Seconds of one call: until the work is done, and until the host is free again."""

    done: float
    host: float


def sample(call: Call, device: str) -> Sample:
    """One sample of `call` on "cpu" or "cuda"."""
    if device == "cpu":
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        return Sample(seconds, seconds)
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began = time.perf_counter()
    begin.record()
    for _ in range(QUEUED):
        call()
    end.record()
    host = time.perf_counter() - began
    end.synchronize()
    return Sample(begin.elapsed_time(end) / 1e3 / QUEUED, host / QUEUED)


def in_turn(
    calls: Mapping[str, Call], device: str, rounds: int, left: Callable[[float], None] = lambda seconds: None
) -> dict[str, list[Sample]]:
    """Samples of each call by round, after `WARM` rounds; a slow moment of the machine meets all calls alike.

    `left` hears before the first of the samples about how many seconds they will take.
    """
    taken: dict[str, list[Sample]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for number in range(WARM + rounds):
            began = time.perf_counter()
            for name, call in calls.items():
                found = sample(call, device)
                if number >= WARM:
                    taken[name].append(found)
            if number == WARM - 1:
                left((time.perf_counter() - began) * rounds)
    return taken


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collections happen between samples of this process, not in them."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def copy_call(size: int, device: str) -> tuple[Call, int]:
    """A copy that moves about `size` bytes, half of them read and half written, and the bytes that it moves.

    It takes `LARGEST_COPY` of memory at most: what is beyond that is copied from and to the same place again.
    """
    half = max(size // 2, 1)
    source = torch.ones(min(half, LARGEST_COPY // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    whole, rest = divmod(half, source.numel())

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return copy, 2 * half
