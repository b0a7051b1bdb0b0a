"""What a rank puts into collectives, counted: bytes of tensors as they are handed over, by kind.

It is counted where Python hands tensors to torch's process groups, whoever asks: an addition for each call. What of it
goes over the wire, and how often, is the backend's (in a ring of N ranks each sends (N - 1) / N of a gathered tensor).
Of an all-to-all only what is for other ranks counts.
"""

from __future__ import annotations

import threading
from collections import Counter
from functools import wraps
from typing import Any

import torch
from torch import Tensor

ALL_GATHER, ALL_REDUCE, REDUCE, REDUCE_SCATTER = "all-gather", "all-reduce", "reduce", "reduce-scatter"
BROADCAST, ALL_TO_ALL = "broadcast", "all-to-all"

_KINDS = {
    ALL_GATHER: "all_gather_single all_gather_single_coalesced allgather allgather_coalesced _allgather_base "
    "allgather_into_tensor_coalesced",
    ALL_REDUCE: "allreduce allreduce_coalesced",
    REDUCE: "reduce",
    REDUCE_SCATTER: "reduce_scatter reduce_scatter_single reduce_scatter_single_coalesced _reduce_scatter_base "
    "reduce_scatter_tensor_coalesced",
    BROADCAST: "broadcast",
    ALL_TO_ALL: "all_to_all_single alltoall alltoall_base",
    "other": "gather scatter send",
}
"""Methods of a process group, in all versions of torch that are supported."""

_total: Counter[str] = Counter()
_lock = threading.Lock()  # a checkpoint is written in a thread
_installed = False


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _sent(group: Any, sent: Any, splits: Any = None) -> int:
    """Bytes of an all-to-all that go to other ranks; what a rank has for itself is in the same tensor."""
    if not isinstance(sent, Tensor):
        return _bytes(sent) - _bytes(sent[group.rank()])
    if not sent.dim() or not sent.numel():
        return 0
    kept = splits[group.rank()] if splits else sent.shape[0] // group.size()
    return sent.nbytes - kept * (sent.nbytes // sent.shape[0])


def _counted(method: Any, kind: str) -> Any:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.size() > 1:
            # The whole of what is gathered or scattered is the larger of the first two arguments, output and input.
            size = _sent(self, *args[1:4:2]) if kind == ALL_TO_ALL else max(map(_bytes, args[:2]), default=0)
            with _lock:
                _total[kind] += size
        return method(self, *args, **kwargs)

    return call


class Wire:
    """Counts from where it is made; counting begins for good with the first one."""

    def __init__(self) -> None:
        _install()
        self._before = Counter(_total)

    def since(self) -> dict[str, int]:
        """Bytes by kind since the last call, or since it was made."""
        with _lock:
            now = Counter(_total)
        found, self._before = now - self._before, now
        return dict(sorted(found.items()))


def _install() -> None:
    global _installed
    if _installed:
        return
    group: Any = torch.distributed.ProcessGroup
    for kind, names in _KINDS.items():
        for name in names.split():
            if hasattr(group, name):
                setattr(group, name, _counted(getattr(group, name), kind))
    _installed = True
