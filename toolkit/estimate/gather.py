"""When ZeRO-3 gathers weights and frees them again.

Follows DeepSpeed 0.19.8's partitioned_param_coordinator.py, after it has recorded the order of modules: a module's
weights are gathered before it runs, those of the next modules ahead of time, and freed after it unless they are needed
again soon.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolkit.config.deepspeed import Buckets
from toolkit.estimate.dry_run import Call, DryRun
from toolkit.memory.storages import Lifetime
from toolkit.records import categories as c
from toolkit.state.sharding import shard_size

Allocate = Callable[[float, str, str, int, int | None], Lifetime]
"""Adds a lifetime: bytes, category, what, from, until."""


@dataclass
class _InFlight:
    """Weights that are gathered together: one buffer, of which each is copied at the first wait for any of them.

    A single one is not copied: it is the buffer. On a GPU, where it has padding that it lacks room for, it is copied
    there out of `padded`.
    """

    numbers: list[int]
    buffer: Lifetime
    left: set[int]
    padded: Lifetime | None = None
    arrived: bool = False


def gather(
    dry_run: DryRun,
    width: int,
    elements: Sequence[int],
    padded: Sequence[int],
    buckets: Buckets,
    allocate: Allocate,
    *,
    ranks: int,
    on_gpu: bool,
) -> list[list[int]]:
    """Allocate the weights that are gathered, for as long as they are.

    Args:
        width: bytes of an element.
        elements, padded: numel of each whole parameter, and of the parts of it that ranks hold.
        allocate: called for every buffer.
        ranks: of several, weights that are gathered together are cut out of one buffer, each as a copy.

    Returns:
        The numbers of the weights that a pass gathers, as often as it does; those that are gathered together beside
        one another. Those that stay whole are none of them.
    """

    def gathered(number: int, moment: int) -> Lifetime:
        return allocate(width * elements[number], c.GATHERED, dry_run.parameters[number].name, moment, None)

    persistent = {number for number, numel in enumerate(elements) if numel <= buckets.persistent}
    available: dict[int, Lifetime] = {number: gathered(number, -1) for number in sorted(persistent)}
    uses = _uses(dry_run)
    order: deque[tuple[int, int]] = deque((step, number) for step, use in enumerate(uses) for number in use.parameters)
    fetched_for = dict.fromkeys(range(len(elements)), -1)
    in_flight: dict[int, _InFlight] = {}
    live = 0
    asked: list[list[int]] = []

    def submit(numbers: list[int], moment: int) -> None:
        nonlocal live
        asked.append(numbers)
        live += sum(elements[number] for number in numbers)
        if ranks == 1:
            available.update({number: gathered(number, moment) for number in numbers})
            return
        size, room = sum(padded[number] for number in numbers), sent(numbers, elements, padded, ranks, on_gpu=False)
        what = "weights gathered together" if len(numbers) > 1 else dry_run.parameters[numbers[0]].name
        flight = _InFlight(numbers, allocate(width * room, c.GATHERED, what, moment, None), set(numbers))
        if on_gpu and room < size:
            flight.padded = allocate(width * size, c.GATHERED, f"{what} and its padding", moment, None)
        in_flight.update(dict.fromkeys(numbers, flight))

    def wait(number: int, moment: int) -> None:
        flight = in_flight.pop(number, None)
        if flight is None:
            return
        flight.left.discard(number)
        if len(flight.numbers) > 1 and not flight.left:
            flight.buffer.freed_at = moment if flight.arrived else moment + 2
        if flight.arrived:
            return
        flight.arrived = True
        if len(flight.numbers) == 1:
            available[number] = flight.buffer
            if flight.padded is not None:
                flight.padded.freed_at = moment + 1
        else:
            available.update({other: gathered(other, moment + 1) for other in flight.numbers})

    for step, use in enumerate(uses):
        missing = [number for number in use.parameters if number not in available and number not in in_flight]
        if missing:
            submit(missing, use.opened)
        for number in use.parameters:
            wait(number, use.opened)
        new = {number for number in use.parameters if fetched_for[number] < step}
        seen: set[int] = set()
        while order and len(seen) < len(new):
            used_at, number = order.popleft()
            fetched_for[number] = used_at
            seen.add(number)
        ahead: list[int] = []
        numel, most = 0, min(buckets.live - live, buckets.prefetch)
        while order and numel < most:
            used_at, number = order.popleft()
            fetched_for[number] = max(fetched_for[number], used_at)
            if number not in available and number not in in_flight and number not in ahead:
                ahead.append(number)
                numel += elements[number]
        if ahead:
            submit(ahead, use.opened)
        closed = use.closed if use.closed is not None else dry_run.storages.now
        keep, distance = set(), 0
        for later in uses[step + 1 :]:
            if distance >= buckets.reuse:
                break
            for number in later.parameters:
                keep.add(number)
                distance += elements[number]
        for number in use.parameters:
            if number in persistent or number in keep or number not in available:
                continue
            lifetime = available.pop(number)
            lifetime.freed_at = max(closed, lifetime.allocated_at + 1)
            live -= elements[number]
    for flight in in_flight.values():
        for buffer in (flight.buffer, flight.padded):
            if buffer is not None and buffer.freed_at is None:
                buffer.freed_at = dry_run.storages.now
    return asked


def sent(numbers: Sequence[int], elements: Sequence[int], padded: Sequence[int], ranks: int, *, on_gpu: bool) -> int:
    """Elements that all ranks send of weights that are gathered together.

    DeepSpeed makes room for a single one without its padding, which on a CPU stays where it is
    (toolkit/zero/partition.py).
    """
    if len(numbers) > 1 or on_gpu:
        return sum(padded[number] for number in numbers)
    return sum(shard_size(elements[number], ranks, 1) * ranks for number in numbers)


def _uses(dry_run: DryRun) -> list[Call]:
    """Every use of a module's weights, in order: its calls, and its part of the backward pass."""
    arrived = dict(dry_run.arrivals)
    turn = next(moment for name, moment in dry_run.storages.phases if name == "backward")
    forward = [call for call in dry_run.calls if call.opened < turn]
    backward: list[Call] = []
    ends = []
    next_one = math.inf  # the first gradient to arrive of the calls so far: whatever is called later ends before it
    for call in forward:
        end = max((arrived[n] for n in call.parameters if n in arrived), default=math.inf)
        frozen = end is math.inf and bool(call.parameters)
        end = next_one if frozen else end
        next_one = min(next_one, end)
        ends.append((end, -call.opened if frozen else call.opened, call))
    ends.sort()
    before = turn
    for end, _, call in ends:
        if end == math.inf:
            continue
        moment = int(end)
        # Weights are gathered again before the first operation of the module's own backward pass.
        backward.append(Call(min(before, moment), moment + 1, call.parameters))
        before = moment + 1
    return sorted([*dry_run.calls, *backward], key=lambda call: call.opened)
