"""What the machine says a phase has held: the caching allocator's watermark, or the process's resident set."""

from __future__ import annotations

import contextlib
import os
import resource
from typing import Protocol

import psutil
import torch

from toolkit.memory.machine import control_groups
from toolkit.records.memory import Allocator

RESERVED_SPACE = "address space (RLIMIT_AS)"


class Watermark(Protocol):
    """The largest amount of memory since it was last reset."""

    source: str
    """In words, for the record."""

    def begin(self) -> None:
        """Forget the peak: a phase begins."""

    def read(self) -> tuple[int | None, int]:
        """Since `begin`: peak of allocated bytes where known, and the largest resident set or reserved bytes."""

    def now(self) -> int:
        """Bytes allocated now, or resident where that is not known."""


class ResidentSet:
    """The resident set of this process, at its peak where Linux lets a process reset that (clear_refs)."""

    source = "resident set"

    def __init__(self) -> None:
        self._clear: int | None = None
        self._status: int | None = None
        with contextlib.suppress(OSError):
            self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
            self._clear = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        self._first = 0

    def begin(self) -> None:
        if self._clear is not None:
            try:
                os.pwrite(self._clear, b"5", 0)
                return
            except OSError:
                os.close(self._clear)
                self._clear = None
        self._first = self.now()

    def read(self) -> tuple[int | None, int]:
        if self._clear is not None:
            return None, self._line(b"VmHWM:")
        return None, max(self._first, self.now())

    def now(self) -> int:
        return self._line(b"VmRSS:") if self._status is not None else psutil.Process().memory_info().rss

    def _line(self, name: bytes) -> int:
        assert self._status is not None
        text = os.pread(self._status, 8192, 0)
        return int(text[text.index(name) + len(name) :].split(None, 1)[0]) * 1024

    def __del__(self) -> None:
        for descriptor in (self._clear, self._status):
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(descriptor)


class CachingAllocator:
    """torch's allocator on a GPU.

    Its only watermark is reset at every phase: `torch.cuda.max_memory_allocated` then counts from there.
    """

    source = "CUDA caching allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> tuple[int | None, int]:
        # The nested form: `torch.cuda.max_memory_allocated` flattens every statistic first.
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        return stats["allocated_bytes"]["all"]["peak"], stats["reserved_bytes"]["all"]["peak"]

    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def workspaces(self) -> int:
        """Bytes of cuBLAS's workspaces, one for each thread that multiplies matrices (32 MiB on Hopper, else 8.1).

        Allocations without a tensor, of which torch keeps no count: they are given back here, and taken again by the
        next product.
        """
        before = self.now()
        torch._C._cuda_clearCublasWorkspaces()
        return before - self.now()

    def state(self) -> Allocator:
        """What is allocated, reserved and free now; walks all segments."""
        allocated, reserved = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        free = [
            block["size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["device"] == self._device.index
            for block in segment["blocks"]
            if block["state"] == "inactive"
        ]
        return Allocator(
            allocated=allocated,
            reserved=reserved,
            largest_free_block=max(free, default=0),
            fragmentation=1 - allocated / reserved if reserved else 0.0,
        )


def watermark(device: torch.device) -> ResidentSet | CachingAllocator:
    """The watermark of memory on `device`."""
    return CachingAllocator(device) if device.type == "cuda" else ResidentSet()


def limits(device: torch.device, ranks: int = 1) -> dict[str, int]:
    """Bytes that this process may have, by what sets the limit; only what limits it.

    Of what all processes of the machine have together it is an equal share of the `ranks` on it.
    """
    found: dict[str, int] = {}
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_properties(device).total_memory
        return found
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        found[RESERVED_SPACE] = soft
    machine = psutil.virtual_memory().total
    group = min((limit for limit, _ in control_groups()), default=None)
    shared = f", shared by {ranks} ranks" if ranks > 1 else ""
    if group is not None and group < machine:
        found[f"control group{shared}"] = group // ranks
    found[f"this machine{shared or ', all processes'}"] = machine // ranks
    return found
