"""What is in memory now, from the names of tensors: bytes by category, and the largest tensors."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from torch import Tensor

from toolkit.records import categories as c
from toolkit.records.memory import LargeTensor

LARGEST = 30
"""Largest tensors that are written down."""

Named = tuple[str, str, Tensor]
"""Category, name and tensor."""


def by_category(named: Iterable[Named], device: str) -> tuple[dict[str, int], dict[str, int], list[LargeTensor]]:
    """Add up the storages of `named`, each once and under its first name.

    Returns:
        Bytes by category on devices of type `device`, the same in host memory where that is another, and the largest
        tensors on `device`.
    """
    seen: set[int] = set()
    here: list[LargeTensor] = []
    on_host: list[tuple[str, int]] = []
    for category, name, tensor in named:
        storage = tensor.untyped_storage()
        if storage._cdata in seen or not (size := storage.nbytes()):
            continue
        seen.add(storage._cdata)
        if tensor.device.type == device:
            here.append(LargeTensor(bytes=size, category=category, what=name, where="", phase=c.INIT))
        elif tensor.device.type == "cpu":
            on_host.append((category, size))
    return (
        c.bytes_by_category((one.category, one.bytes) for one in here),
        c.bytes_by_category(on_host),
        heapq.nlargest(LARGEST, here, key=lambda one: one.bytes),
    )
