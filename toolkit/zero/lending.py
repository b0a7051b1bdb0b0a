"""Collectives on a CPU take no memory beside their tensors, and none once they are over.

gloo does its work in threads. A thread says that a collective is done, and only then lets go of the tensors: on a busy
machine it is held up in between, and whoever waited allocates the next tensor beside one that is as good as freed. So
it is given views that nobody else has, whose counts say when it has let go.

Its all-gather and its reduce-scatter make a copy of everything, too: the one gathers into a buffer of its own, the
other adds up a copy. A broadcast by each rank and an all-reduce, in place, send the same bytes and give the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from deepspeed import comm as dist
from torch import Tensor

from toolkit.printable import warn_once

logger = logging.getLogger("toolkit")

_LOOK, _LONGEST = 2e-5, 1.0  # seconds


class _Lent:
    """The handle of a collective that is over once nobody else holds its tensors."""

    kept = False
    """Whether somebody was seen to hold them for good."""

    def __init__(self, start: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        views = [tensor.detach() for tensor in tensors]
        self._held = [(view, _holders(view)) for view in views]
        self._work = start(*views)

    def wait(self, **kwargs: Any) -> None:
        work, self._work = self._work, None
        if work is None:
            return
        work.wait(**kwargs)
        del work  # which holds them, too
        held, self._held = self._held, []
        latest = time.monotonic() + _LONGEST
        for view, count in held:
            while _holders(view) > count and not _Lent.kept:
                if time.monotonic() > latest:  # it is about memory only: no reason to stand still, now or again
                    _Lent.kept = True
                    warn_once(
                        logger, "something keeps the tensors of collectives: peaks of memory are above the estimate"
                    )
                    break
                time.sleep(_LOOK)


def _holders(tensor: Any) -> int:
    count: int = tensor._use_count()
    return count


class _All:
    """The handle of several collectives."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def wait(self, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.wait(**kwargs)


def lend(start: Callable[..., Any], *tensors: Tensor) -> Any:
    """The handle of `start(*tensors)`, an asynchronous collective.

    On a CPU its `wait` lasts until the tensors are nobody's but the caller's.
    """
    return _Lent(start, tensors) if all(tensor.is_cpu for tensor in tensors) else start(*tensors)


def gather_in_place(parts: Sequence[Tensor], group: Any) -> Any:
    """The handle of an all-gather on a CPU: rank i of `group` has `parts[i]`, and the others get it."""

    def send(part: Tensor, rank: int) -> Any:
        root = dist.get_global_rank(group, rank)
        return lend(lambda view: dist.broadcast(view, root, group=group, async_op=True), part)

    return _All([send(part, rank) for rank, part in enumerate(parts) if part.numel()])


def add_in_place(tensor: Tensor, group: Any) -> None:
    """Add `tensor` up over the ranks of `group`, on a CPU."""
    if dist.get_world_size(group) > 1:
        lend(lambda view: dist.all_reduce(view, group=group, async_op=True), tensor).wait()
