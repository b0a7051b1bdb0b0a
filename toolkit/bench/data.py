"""The data path: how many tokens a second it gives, and how long a training step waits for its batch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from toolkit.bench.record import Row, Spread
from toolkit.bench.step import Measured
from toolkit.run.prepare import prepare
from toolkit.run.settings import RunSettings

if TYPE_CHECKING:
    from toolkit.data.batches import Batches

FIRST, AGAIN = "first pass", "from the cache"
_EDGE = 512


def measure(
    settings: RunSettings, batches: int, step_seconds: float, repeats: int, *, say: Callable[[str], None]
) -> Measured:
    """Read as one rank of a run does, first into a token cache of its own and then from it.

    Each time `repeats` rounds as fast as batches come, then as many of `batches` beside computation.

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
    found = Measured()
    with tempfile.TemporaryDirectory(prefix="leanstate-bench-") as folder:
        for name in (FIRST, AGAIN):
            cache = data.TokenCache(Path(folder, "tokens"), name)
            stream = data.rank_batches(prepared.data, rank=0, world_size=1, micro_batch=micro, cache=cache)
            try:
                if name == FIRST:  # begins to read and to tokenize; the other pass ends a round before its files do
                    _round(stream, batches)
                say(f"{name}: {repeats} rounds of whole windows of documents, as fast as they come")
                rates = [settings.seq_len * micro * _round(stream, batches) for _ in range(repeats)]
                say(f"{name}: {repeats} rounds beside steps of {1e3 * step_seconds:g} ms")
                waits = [_waiting(stream, batches, step_seconds) for _ in range(repeats)]
            finally:
                stream.close()
            timed = {"tokens_per_s": Spread.of(rates), "wait_seconds": Spread.of(waits)}
            wait = timed["wait_seconds"].median
            counted = {
                "wait_share": wait / (wait + step_seconds),
                "asked_per_s": micro * settings.seq_len / step_seconds,
            }
            found.rows.append(Row(name=name, timed=timed, counted=counted))
            if not cache.kept:
                found.left_out[AGAIN] = f"tokens cannot be kept in {folder}"
                break
    return found


def _round(stream: Batches, least: int) -> float:
    """Batches a second, of `least` at least and up to the end of a window of documents.

    Documents are read a window at a time, tokenized by the dozen and handed out in groups of sequences: a round that
    is shorter may find all of its batches ready and time the memory alone, or wait for those of the next.
    """
    begin = stream.position
    read = 0
    began = time.perf_counter()
    while read < least or (stream.position.epoch, stream.position.window) == (begin.epoch, begin.window):
        next(stream)
        read += 1
    return read / (time.perf_counter() - began)


def _waiting(stream: Batches, batches: int, step_seconds: float) -> float:
    """Mean seconds that a step waits for its batch, where each step computes for `step_seconds` after it."""
    a = torch.ones(_EDGE, _EDGE)
    before = stream.waited
    for _ in range(batches):
        next(stream)
        got = time.perf_counter()
        while time.perf_counter() - got < step_seconds:
            torch.mm(a, a)
    return (stream.waited - before) / batches
