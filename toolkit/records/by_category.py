"""What is held now, from the names of tensors: bytes by category, and the largest ones."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from torch import Tensor

from toolkit.records import categories as c
from toolkit.records.memory import Block

BLOCKS = 30
"""Largest ones that are written down."""

Named = tuple[str, str, Tensor]
"""Category, name and tensor."""


def by_category(named: Iterable[Named], device: str) -> tuple[dict[str, int], dict[str, int], list[Block]]:
    """Add up the storages of `named`, each once and under its first name.

    Returns:
        Bytes by category on devices of type `device`, the same in host memory where that is another, and the largest
        blocks on `device`.
    """
    seen: set[int] = set()
    here: dict[str, int] = {}
    on_host: dict[str, int] = {}
    blocks: list[Block] = []
    for category, name, tensor in named:
        storage = tensor.untyped_storage()
        if storage._cdata in seen or not (size := storage.nbytes()):
            continue
        seen.add(storage._cdata)
        if tensor.device.type == device:
            here[category] = here.get(category, 0) + size
            blocks.append(Block(bytes=size, category=category, what=name, where="", phase=c.INIT))
        elif tensor.device.type == "cpu":
            on_host[category] = on_host.get(category, 0) + size
    return _sorted(here), _sorted(on_host), heapq.nlargest(BLOCKS, blocks, key=lambda block: block.bytes)


def _sorted(held: dict[str, int]) -> dict[str, int]:
    return {name: held[name] for name in c.ordered(held)}
