"""One training step with every allocation named: torch's allocator says how much, the tracker says what.

On a CPU the profiler reports every allocation and release with the allocator's total. What the tracker saw as a
tensor takes its name from there; what an operation used within itself goes by the operation.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from toolkit.memory.storages import Curve, Lifetime, StorageTrace
from toolkit.memory.tracker import Tracker
from toolkit.memory.watermarks import CachingAllocator
from toolkit.records import categories as c
from toolkit.records.by_category import Named


def count_from_here() -> None:
    """Let torch's CPU allocator keep count from now on; call it before the model is built.

    Without it a trace holds what has a name, and "other" stays 0.
    Also counts on threads that the profiler does not see: gloo's give back what they sent.
    """
    _flag().value = True


def counted() -> bool:
    """Whether `count_from_here` was called."""
    return _flag().value


def _flag() -> ctypes.c_bool:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage")


class StepTrace:
    """Traces what happens within it, as a context manager, on this thread's device.

    Args:
        model: whose blocks and gradients are followed.
        head: the module that makes logits, if there is one.
        inventory: what is there already, by category and name; called at the start, and at the end of every phase for
            what has been added.
        on_gpu: take totals from the caching allocator instead of the profiler.

    After it, `storages` and `curve` hold the step, with "other" for what nothing names.
    """

    def __init__(
        self, model: nn.Module, head: nn.Module | None, inventory: Callable[[], Iterable[Named]], *, on_gpu: bool
    ) -> None:
        self.storages = StorageTrace(nanoseconds=[])
        self.curve: Curve
        self._model, self._head, self._inventory, self._on_gpu = model, head, inventory, on_gpu
        self._tracker = Tracker(self.storages, sites=True)
        self._profile: Any = None
        self._begun: list[int] = []
        """When each phase began."""

    def __enter__(self) -> StepTrace:
        for category, name, tensor in self._inventory():
            self._tracker.adopt(tensor, category, name)
        self._tracker.attach(self._model, self._head, lambda number, parameter: None)
        if self._on_gpu:
            allocator = CachingAllocator(torch.device("cuda", torch.cuda.current_device()))
            self._workspaces, self._before = allocator.workspaces(), allocator.now()
        else:
            # Or it prints two lines a trace on stderr; read when the profiler starts for the first time.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            try:
                self._profile.start()
            except Exception:  # another profiler is at work
                self._tracker.detach()
                raise
        self._tracker.__enter__()
        return self

    def phase(self, name: str) -> None:
        """From here on it is phase `name`."""
        self._name_new()
        self.storages.begin(name)
        self._begun.append(time.time_ns())

    def _name_new(self) -> None:
        for category, name, tensor in self._inventory():
            lifetime = self._tracker.lifetime(tensor)
            if lifetime is not None and lifetime.allocated_at >= 0 and lifetime.category in (None, c.BUCKETS):
                lifetime.category = category
                if not (category == c.GRADIENTS and lifetime.parameter is not None):
                    lifetime.what = name

    def __exit__(self, *error: Any) -> None:
        self._name_new()
        self._tracker.__exit__(*error)
        self._tracker.detach()
        if self._profile is not None:
            self._profile.stop()
        if error[0] is None:
            self._finish()

    def _finish(self) -> None:
        self.storages.classify()
        if self._on_gpu:
            self._add_other()
            return
        events = list(allocations(self._profile))
        self._join(sorted(events, key=lambda event: event.start_time_ns))

    def _add_other(self) -> None:
        lifetimes = self.storages.lifetimes
        other = max(0, self._before - sum(one.bytes for one in lifetimes if one.allocated_at < 0))
        lifetimes.append(Lifetime(other, -1, None, c.INIT, c.OTHER, "before the trace"))
        # Taken again by the first products of the step, within an operation: no tracker sees it.
        lifetimes.append(Lifetime(self._workspaces, -1, None, c.INIT, c.WORKSPACES, "workspaces of cuBLAS"))
        self.curve = self.storages.curve()

    def _join(self, events: list[Any]) -> None:
        """Put the tracker's lifetimes and the allocator's events on one axis of time."""
        storages = self.storages
        assert storages.nanoseconds is not None
        log = _Log(events)
        # In nanoseconds, and where the allocator says so, when it happened rather than when the tracker saw it.
        spans: list[tuple[int, int | None]] = []
        for lifetime in storages.lifetimes:
            allocated_at = storages.nanoseconds[lifetime.allocated_at] if lifetime.allocated_at >= 0 else None
            freed_at = storages.nanoseconds[lifetime.freed_at] if lifetime.freed_at is not None else None
            spans.append(log.claim(lifetime.address, lifetime.bytes, allocated_at, freed_at))
        inside = log.unclaimed()
        moments = sorted({*storages.nanoseconds, *(event.start_time_ns for event in events)})
        place = {moment: index for index, moment in enumerate(moments)}
        phases = [
            (name, bisect.bisect_left(moments, begun))
            for (name, _), begun in zip(storages.phases, self._begun, strict=True)
        ]
        heads = [
            [place[storages.nanoseconds[min(moment, storages.now - 1)]] for moment in (first, last)]
            for first, last in storages.heads
        ]
        for lifetime, (first, last) in zip(storages.lifetimes, spans, strict=True):
            lifetime.allocated_at = place[first] if lifetime.allocated_at >= 0 else -1
            lifetime.freed_at = None if last is None else place[last]
        for address, size, first, last, operation in inside:
            start = place[first]
            phase = next((name for name, begun in reversed(phases) if begun <= start), c.INIT)
            category = c.LOGITS if any(begun <= start <= ended for begun, ended in heads) else c.TRANSIENTS
            end = None if last is None else place[last]
            what = f"inside {operation}"
            storages.lifetimes.append(Lifetime(size, start, end, phase, category, what, operation, address=address))
        storages.phases, storages.now, storages.nanoseconds = phases, len(moments), moments
        named = storages.curve()
        # Without a count from the start its totals lack what was there, and hold what earlier traces left.
        known = bool(events) and counted()
        other = (log.totals(moments) - named.total).clip(min=0) if known else 0 * named.total
        self.curve = Curve(named.changes | {c.OTHER: np.diff(other, prepend=0)}, named.total + other, phases)


def allocations(profiled: Any) -> Iterable[Any]:
    """The events of torch's CPU allocator, in no order, of a profile that has ended and was made with its memory."""
    waiting = list(profiled.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event


class _Log:
    """The allocator's events by address."""

    def __init__(self, events: list[Any]) -> None:
        self._events = events
        self._made: dict[int, list[int]] = defaultdict(list)
        self._freed: dict[int, list[int]] = defaultdict(list)
        self._left: dict[tuple[int, int], tuple[int, str]] = {}
        for event in events:
            fields, moment = event.extra_fields, event.start_time_ns
            if fields.alloc_size > 0:
                self._made[fields.ptr].append(moment)
                self._left[fields.ptr, moment] = fields.alloc_size, _operation(event)
            else:
                self._freed[fields.ptr].append(moment)
        self._times = [event.start_time_ns for event in events]
        totals = [event.extra_fields.total_allocated for event in events]
        self._unseen = [
            total - before - event.extra_fields.alloc_size
            for before, total, event in zip(totals[:1] + totals, totals, events, strict=False)
        ]
        """By event, what threads that the profiler does not see have added since the event before; negative: freed."""
        self._unseen[:1] = [0] * bool(events)

    def claim(self, address: int, size: int, seen: int | None, gone: int | None) -> tuple[int, int | None]:
        """When the tensor of `size` bytes at `address`, which the tracker saw from `seen` to `gone`, was allocated and
        released.

        A tensor is seen right after it was allocated and right before it is released.
        """
        made, freed = self._made[address], self._freed[address]
        known = seen is None  # from before the trace; else once its allocation is found
        # What the allocator has no record of (shared memory, another library's) must not take another's allocation.
        if (
            seen is not None
            and (at := bisect.bisect_right(made, seen))
            and self._left.pop((address, made[at - 1]), None) is not None
        ):
            seen, known = made[at - 1], True
        if gone is not None and (at := bisect.bisect_left(freed, gone)) < len(freed):
            following = bisect.bisect_right(made, gone)
            if following == len(made) or freed[at] <= made[following]:
                return seen or 0, freed[at]
        return seen or 0, self._freed_unseen(size, gone) if gone is not None and known else gone

    def _freed_unseen(self, size: int, gone: int) -> int:
        """When another thread gave back `size` bytes that were about to go at `gone`: the totals show it late.

        One of gloo's may be held up in between, while this thread allocates the next tensor beside them.
        """
        for at in range(bisect.bisect_left(self._times, gone), len(self._times)):
            if self._unseen[at] <= -size:
                self._unseen[at] += size
                return self._times[at]
        return gone

    def unclaimed(self) -> list[tuple[int, int, int, int | None, str]]:
        """Allocations that were no tensor's: address, bytes, from when, until when, and the operation within."""
        found = []
        for (address, made), (size, operation) in self._left.items():
            freed = self._freed[address]
            at = bisect.bisect_right(freed, made)
            found.append((address, size, made, freed[at] if at < len(freed) else None, operation))
        return found

    def totals(self, moments: list[int]) -> np.ndarray:
        """The allocator's total at each of `moments`, int64."""
        times = np.array([event.start_time_ns for event in self._events])
        values = np.array([event.extra_fields.total_allocated for event in self._events], dtype=np.int64)
        before = values[0] - self._events[0].extra_fields.alloc_size
        at = np.searchsorted(times, np.array(moments), side="right") - 1
        return np.where(at < 0, before, values[at])


def _operation(event: Any) -> str:
    return event.parent.name if event.parent is not None else "torch"
