"""The data path: how many tokens a second it gives, and how long a training step waits for its batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from toolkit.bench.record import Row, Spread
from toolkit.bench.step import Measured
from toolkit.run.prepare import prepare
from toolkit.run.settings import RunSettings

_EDGE = 512


def measure(
    settings: RunSettings, batches: int, step_seconds: float, repeats: int, *, say: Callable[[str], None]
) -> Measured:
    """Read `batches` micro-batches in each of `repeats` rounds as fast as they come, then as many beside computation.

    Args:
        settings: of a run; its batch, data, tokenizer and sequences are those that are read.
        step_seconds: of computation after each batch, which uses the threads that the tokenizer would like to have.

    Raises:
        UserError: what `prepare` finds wrong.
    """
    from toolkit import data

    say(f"opening {settings.data}")
    prepared = prepare(settings)
    micro = prepared.batch.micro
    stream = data.rank_batches(prepared.data, rank=0, world_size=1, micro_batch=micro)
    tokens = batches * micro * settings.seq_len
    rates: list[float] = []
    _read(stream, batches)
    say(f"{repeats} rounds of {batches} batches, as fast as they come")
    for _ in range(repeats):  # one after the other: sequences come in groups, of which some are ready after a pause
        began = time.perf_counter()
        _read(stream, batches)
        rates.append(tokens / (time.perf_counter() - began))
    say(f"{repeats} rounds beside steps of {1e3 * step_seconds:g} ms")
    waits = [_waiting(stream, batches, step_seconds) for _ in range(repeats)]
    stream.close()
    timed = {"tokens_per_s": Spread.of(rates), "wait_seconds": Spread.of(waits)}
    wait = timed["wait_seconds"].median
    counted = {"wait_share": wait / (wait + step_seconds), "asked_per_s": micro * settings.seq_len / step_seconds}
    return Measured(rows=[Row(name=settings.data, timed=timed, counted=counted)])


def _read(stream: Iterator[torch.Tensor], batches: int) -> None:
    for _ in range(batches):
        next(stream)


def _waiting(stream: Iterator[torch.Tensor], batches: int, step_seconds: float) -> float:
    """Mean seconds that a step waits for its batch, where each step computes for `step_seconds` after it."""
    a = torch.ones(_EDGE, _EDGE)
    waited = 0.0
    for _ in range(batches):
        began = time.perf_counter()
        next(stream)
        got = time.perf_counter()
        waited += got - began
        while time.perf_counter() - got < step_seconds:
            torch.mm(a, a)
    return waited / batches
