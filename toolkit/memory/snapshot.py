"""Snapshots that https://pytorch.org/memory_viz opens, made where torch itself makes none: on a CPU.

The format is that of `torch.cuda.memory._snapshot` (torch/cuda/_memory_viz.py reads it, too): `device_traces` says
what was allocated and released in order, `segments` what is allocated at the end.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from toolkit.memory.storages import Lifetime
from toolkit.records.memory import LargeTensor

_Entry = dict[str, Any]


def of_step(lifetimes: Iterable[Lifetime], moments: list[int]) -> _Entry:
    """A snapshot of a traced step; `moments`: nanoseconds of each moment.

    Addresses are made up: a storage that was released and one that took its place must not be confused.
    """
    events: list[tuple[int, int, _Entry]] = []
    left: list[_Entry] = []
    address = 1 << 20
    for lifetime in lifetimes:
        if not lifetime.bytes or (lifetime.freed_at is not None and lifetime.freed_at <= lifetime.allocated_at):
            continue
        entry = _entry(address, lifetime.bytes, lifetime.category or "", lifetime.what, lifetime.where)
        address += -(-lifetime.bytes // 512) * 512
        start, end = lifetime.allocated_at, lifetime.freed_at
        if start >= 0:
            events.append((start, 1, entry | {"action": "alloc", "time_us": moments[start] // 1000}))
        # Releases first: at one moment, what is made takes the place of what goes.
        if end is not None and end < len(moments):
            for action in ("free_requested", "free_completed"):
                events.append((end, 0, entry | {"action": action, "time_us": moments[end] // 1000}))
        else:
            left.append(entry)
    events.sort(key=lambda event: event[:2])
    return _snapshot([entry for *_, entry in events], left)


def of_tensors(tensors: Iterable[LargeTensor]) -> _Entry:
    """A snapshot of `tensors` as they are now, without a history."""
    left = []
    address = 1 << 20
    for tensor in tensors:
        left.append(_entry(address, tensor.bytes, tensor.category, tensor.what, tensor.where))
        address += -(-tensor.bytes // 512) * 512
    return _snapshot([], left)


def write(path: Path, snapshot: _Entry) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        pickle.dump(snapshot, file, protocol=4)


def write_cuda(path: Path) -> None:
    """torch's own snapshot of all GPUs of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(path))


def _entry(address: int, size: int, category: str, what: str, where: str) -> _Entry:
    frames = [{"filename": category, "line": 0, "name": what}]
    if where:
        place, _, function = where.partition(" ")
        file, _, line = place.rpartition(":")
        known = line.isdigit()
        frames.append(
            {
                "filename": file if known else "",
                "line": int(line) if known else 0,
                "name": function if known else where,
            }
        )
    return {"addr": address, "size": size, "stream": 0, "frames": frames, "category": category}


def _snapshot(trace: list[_Entry], left: list[_Entry]) -> _Entry:
    segments = [
        {
            "device": 0,
            "address": entry["addr"],
            "total_size": entry["size"],
            "allocated_size": entry["size"],
            "active_size": entry["size"],
            "requested_size": entry["size"],
            "stream": 0,
            "segment_type": "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": [],
            "blocks": [
                {
                    "address": entry["addr"],
                    "size": entry["size"],
                    "requested_size": entry["size"],
                    "state": "active_allocated",
                    "frames": entry["frames"],
                    "category": entry["category"],
                }
            ],
        }
        for entry in left
    ]
    return {"segments": segments, "device_traces": [trace], "allocator_settings": {}, "external_annotations": []}
