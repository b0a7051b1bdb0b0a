"""A rank's micro-batches out of the one stream of packed sequences, worked out ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch

from toolkit.data.pack import Group, PackedTokens
from toolkit.data.passes import Position
from toolkit.data.token_cache import TokenCache

BATCHES_AHEAD = 4
GROUPS_AHEAD = 2

T = TypeVar("T")


class Batches:
    """One rank's micro-batches, without end: int64 tensors [micro_batch, seq_len + 1] on the CPU.

    `position` is where the stream continues after the latest one, and `read_to` how far documents have been read for it
    (`PackedTokens.read_to`), both the same at every number of ranks. `waited` is the seconds that whoever takes the
    batches has waited for them. Background threads work a few groups and batches ahead; an error in them is raised
    here, at the batch it prevented. `close` ends the threads.
    """

    def __init__(
        self,
        ahead: Generator[tuple[torch.Tensor, Position, Position]],
        groups: Generator[Group],
        start: Position,
        cache: TokenCache | None,
    ) -> None:
        self._ahead, self._groups, self._cache = ahead, groups, cache
        self.position = self.read_to = start
        self.waited = 0.0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> torch.Tensor:
        began = perf_counter()
        tokens, self.position, self.read_to = next(self._ahead)
        self.waited += perf_counter() - began
        return tokens

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
        self._ahead.close()
        self._groups.close()


def rank_batches(
    packed: PackedTokens,
    *,
    rank: int,
    world_size: int,
    micro_batch: int,
    start: Position | None = None,
    cache: TokenCache | None = None,
) -> Batches:
    """This rank's micro-batches from `start` on, the beginning of the stream if None.

    Micro-step k of rank r takes the sequences (k * world_size + r) * micro_batch + j, j < micro_batch, of the
    global stream: ranks see disjoint data, and a global batch holds the same sequences at every world size. So
    does what follows a `position`, the same on every rank, whatever the number of ranks before and after it.
    With a `cache`, one rank of a machine tokenizes for all; without, every rank tokenizes the whole stream.
    """
    first = start or Position()
    beginning = replace(first, mixed=0)
    made = packed.groups(beginning) if cache is None else cache.groups(packed.groups, beginning)
    groups = _ahead(made, GROUPS_AHEAD)

    def batches() -> Iterator[tuple[torch.Tensor, Position, Position]]:
        stream = packed.sequences(first, groups)
        while True:
            step = islice(stream, world_size * micro_batch)
            mine = [tokens for place, tokens in enumerate(step) if place // micro_batch == rank]
            yield torch.from_numpy(np.stack(mine)), packed.position, packed.read_to

    return Batches(_ahead(batches(), BATCHES_AHEAD), groups, first, cache)


def _ahead(items: Iterator[T], depth: int) -> Generator[T]:
    """The endless `items`, worked out `depth` ahead by a thread that lives as long as this iterator."""
    worker = ThreadPoolExecutor(1, thread_name_prefix="data")
    try:
        pending: deque[Future[T]] = deque(worker.submit(next, items) for _ in range(depth))
        while True:
            pending.append(worker.submit(next, items))
            yield pending.popleft().result()
    finally:
        worker.shutdown(cancel_futures=True)
