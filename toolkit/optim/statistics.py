"""The parameters of a step of a rule that looks at more than one element, and its functions over what a rank holds.

A pass is one compiled kernel. Sums over whole parameters leave it as one number for each block, and means come back so,
like scales: what this rank holds of a parameter group goes through as one tensor. Rows and columns do not fit blocks:
each parameter has a call of its own, elements go through a buffer of CHUNK elements for each such mean, and come back
through one, so that nothing of the parameter's size is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from toolkit.optim.factored import STRETCH, STRETCH_ELSEWHERE, Factors, Stretch
from toolkit.optim.kernel import StepFunction, step_function
from toolkit.optim.streaming import StreamedStep, TensorStep
from toolkit.state.codecs import BLOCK
from toolkit.state.layout import State, lines_of
from toolkit.state.sharding import Fragment, blocks_of, lines

CHUNK = 2**20
"""Elements at a time where values of single elements are needed outside the kernel: 4 MB for each kind of them."""


class Ranks(Protocol):
    """The ranks that hold a parameter's parts, for sums and exchanges of small tensors and matrices."""

    size: int
    number: int

    def add(self, tensor: Tensor) -> Tensor:
        """`tensor` added up over all ranks."""
        ...

    def swap(self, sent: Tensor, given: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        """Begin to give each rank so many elements of `sent`, which is flat and has those of the first rank first.

        What is returned waits, when it is called, for what all ranks give this one, in the same order.
        """
        ...


class Alone:
    """One process that holds everything."""

    size, number = 1, 0

    def add(self, tensor: Tensor) -> Tensor:
        return tensor

    def swap(self, sent: Tensor, given: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        return lambda: sent


@dataclass(frozen=True)
class Parameter:
    """A whole parameter; `toolkit.state.sharding.matrices_of` says what its rows and columns are."""

    shape: tuple[int, ...]
    component: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return lines(self.shape, "columns")


@dataclass
class Share:
    """What this process steps of a parameter: where it lies, its gradient, flat, and the number of its first block,
    as of `TensorStep.stream`."""

    fragment: Fragment
    gradient: Tensor
    first_block: int


@dataclass
class Member:
    """A parameter in a step: who holds what of it, and this rank's share.

    `small` are the states of its rows and columns, by name, updated in place; `factors` stand for factored states.
    """

    parameter: Parameter
    step: TensorStep
    small: dict[str, Tensor]
    fragments: Sequence[Fragment]
    share: Share | None
    numbers: dict[str, Tensor] = field(default_factory=dict)  # found so far, 0-d
    wide: dict[str, tuple[str, Tensor]] = field(default_factory=dict)  # with "rows" or "columns" or "elements"
    factors: dict[str, Factors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.step.factored:
            rows, columns = (self.small.pop(state.name) for state in lines_of(name))
            self.factors[name] = Factors(rows, columns)

    def update(self, scale: Tensor) -> None:
        """Update weights and state; the gradient is let go of."""
        for _ in run(self, "update", scale):
            pass
        if self.share is not None:
            self.share.gradient = self.share.gradient.new_empty(0)  # a view would keep it


def small_states(
    kept: Sequence[State], parameters: Sequence[Parameter], state: dict[str, Tensor], device: torch.device
) -> list[dict[str, Tensor]]:
    """The states `kept` whole of each of the `parameters` of one tensor: views into its `state`, where they are."""
    found: list[dict[str, Tensor]] = [{} for _ in parameters]
    for small in kept:
        assert small.of is not None
        sizes = [lines(parameter.shape, small.of) for parameter in parameters]
        if small.name not in state:
            state[small.name] = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        for views, view in zip(found, state[small.name].split(sizes), strict=True):
            views[small.name] = view
    return found


# ---- passes over what this rank holds -----------------------------------------------------------------------------


def by_block(members: Sequence[Member], function: str) -> bool:
    """Whether a function of the rule has to do with no values of single elements beside weights and state."""
    kernel = _kernel(members[0].step, function)
    return not any(kernel.results) and not kernel.spread and not any(member.factors for member in members)


def _kernel(step: TensorStep, function: str) -> StepFunction:
    first = step.function
    return first if function == "update" else step_function(first.rule, first.names, first.layout, function)


def _over(
    step: TensorStep,
    kernel: StepFunction,
    part: slice,
    extra: Sequence[Tensor],
    first_block: int,
    opened: Mapping[str, Stretch] = MappingProxyType({}),
) -> StreamedStep:
    """`kernel` over `part` of a tensor, which begins at a block.

    `extra`: what it takes beside what is stored; `opened`: factored states.
    """
    begin, theta = part.start // BLOCK, step.theta[part]
    parts = [held[begin : begin + blocks_of(theta.numel())] for held in step.parts]
    for name, place in step.factored.items():
        parts.insert(place, opened[name].blocks)
    return StreamedStep(
        kernel, step.compiled, theta, [*parts, *extra], step.scalars, (step.seed, step.step, first_block)
    )


def run(member: Member, function: str, scale: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Run a function of the rule over this rank's share of a parameter.

    Yields, for one stretch after the other, the element of the parameter that it begins with and the results of a
    measuring function: for each element, flat, or sums of blocks.
    """
    share, step = member.share, member.step
    if share is None:
        return
    kernel = _kernel(step, function)
    begin, offset, total = share.fragment.start, share.fragment.offset, share.fragment.numel
    most = CHUNK if any(kernel.results) or kernel.spread else total
    if member.factors:
        most = min(most, STRETCH.get(step.theta.device.type, STRETCH_ELSEWHERE))
    for at, size in stretches(total, most):
        blocks = blocks_of(size)
        results = [step.theta.new_zeros(blocks, BLOCK if one else 1, dtype=torch.float32) for one in kernel.results]
        lanes = [] if all(kernel.results) else [_lanes([size], [blocks], step.theta.device)]
        numbers = [member.numbers[name].expand(blocks, 1).contiguous() for name in kernel.numbers]
        spread = [_spread(member, name, begin + at, size, blocks) for name in kernel.spread]
        part, extra = slice(offset + at, offset + at + size), [*results, *lanes, *numbers, *spread]
        opened = {name: factors.whole(begin + at, size) for name, factors in member.factors.items()}
        stretch = _over(step, kernel, part, extra, share.first_block + at // BLOCK, opened)
        stretch.apply(0, share.gradient[at : at + size], scale.to(step.theta.device))
        for name, factors in member.factors.items() if function == "update" else ():
            factors.add(opened[name])
        del opened, stretch  # not held beside those of the next stretch
        yield begin + at, [x.view(-1)[:size] if x.shape[1] == BLOCK else x for x in results]


@dataclass
class Flat:
    """The members that lie in one tensor, in order. `place`: which of all members they are."""

    members: Sequence[Member]
    place: slice

    @cached_property
    def _shares(self) -> list[Share]:
        return [member.share for member in self.members if member.share is not None]

    @cached_property
    def _all(self) -> slice:
        return self._reach(self._shares)

    @cached_property
    def _blocks(self) -> list[int]:
        """Blocks of each member here, with what is between it and the next one: padding."""
        ends = [share.fragment.offset // BLOCK for share in self._shares[1:]] + [blocks_of(self._all.stop)]
        sizes = iter(end - share.fragment.offset // BLOCK for share, end in zip(self._shares, ends, strict=True))
        return [next(sizes) if member.share is not None else 0 for member in self.members]

    def _reach(self, shares: Sequence[Share]) -> slice:
        """From the first of the shares to the end of the last one's last block, as far as the tensor goes."""
        end = blocks_of(shares[-1].fragment.elements.stop) * BLOCK
        return slice(shares[0].fragment.offset, min(end, self.members[0].step.theta.numel()))

    def measure(self, function: str, scale: Tensor) -> list[Tensor]:
        """The results of a measuring function, each added up by member: fp64 [members]."""
        kernel, device = _kernel(self.members[0].step, function), self.members[0].step.theta.device
        if not self._shares:
            return [torch.zeros(len(self.members), dtype=torch.float64, device=device) for _ in kernel.results]
        sizes = [member.share.fragment.numel if member.share is not None else 0 for member in self.members]
        lanes = _lanes(sizes, self._blocks, device)
        results = [torch.zeros_like(lanes) for _ in kernel.results]
        self._stream(kernel, [*results, lanes, *self._numbers(kernel)], scale, drop=False)
        blocks = torch.tensor(self._blocks).to(device, non_blocking=True)
        return [torch.segment_reduce(x.double().squeeze(1), "sum", lengths=blocks, unsafe=True) for x in results]

    def update(self, scale: Tensor) -> None:
        """Update weights and state; gradients are let go of."""
        if self._shares:
            kernel = self.members[0].step.function
            self._stream(kernel, self._numbers(kernel), scale, drop=True)

    def _numbers(self, kernel: StepFunction) -> list[Tensor]:
        """What has been found, for each block: [blocks, 1]."""
        total = sum(self._blocks)
        blocks = torch.tensor(self._blocks).to(self.members[0].step.theta.device, non_blocking=True)
        found = [torch.stack([member.numbers[name] for member in self.members]) for name in kernel.numbers]
        return [torch.repeat_interleave(x, blocks, output_size=total).view(-1, 1) for x in found]

    def _stream(self, kernel: StepFunction, extra: Sequence[Tensor], scale: Tensor, *, drop: bool) -> None:
        step = self.members[0].step
        scale, first = scale.to(step.theta.device), self._all.start // BLOCK
        for shares in self._runs(kernel):
            part = self._reach(shares)
            cut = slice(part.start // BLOCK - first, blocks_of(part.stop) - first)
            stream = _over(step, kernel, part, [x[cut] for x in extra], shares[0].first_block)
            at = part.start
            for offset, gradient in _pieces(shares, drop=drop):
                if offset > at:
                    stream.add(gradient.new_zeros(offset - at), scale)
                stream.add(gradient, scale)
                at = offset + gradient.numel()
                del gradient
            stream.finish(scale)

    def _runs(self, kernel: StepFunction) -> list[list[Share]]:
        """Shares that go through together: all, or, where the number of a block matters, those numbered in a row."""
        return [
            list(run)
            for _, run in groupby(
                self._shares, lambda share: kernel.rounds and share.first_block - share.fragment.offset // BLOCK
            )
        ]


def flats(members: Sequence[Member]) -> list[Flat]:
    """`members` by the tensor that they lie in."""
    found, at = [], 0
    for _, group in groupby(members, lambda member: id(member.step)):
        own = list(group)
        found.append(Flat(own, slice(at, at + len(own))))
        at += len(own)
    return found


def _pieces(shares: Sequence[Share], *, drop: bool) -> Iterator[tuple[int, Tensor]]:
    """Offsets and gradients; those that follow one another in memory as one. `drop`: which are then let go of."""
    waiting: tuple[int, Tensor] | None = None
    for share in shares:
        offset, gradient = share.fragment.offset, share.gradient
        if drop:
            share.gradient = gradient.new_empty(0)  # a view would keep it
        if waiting is not None:
            start, before = waiting
            adjacent = (
                start + before.numel() == offset
                and before.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()
                and before.storage_offset() + before.numel() == gradient.storage_offset()
            )
            if adjacent:
                waiting = (start, before.as_strided((before.numel() + gradient.numel(),), (1,)))
                continue
            yield waiting
        waiting = (offset, gradient)
    if waiting is not None:
        yield waiting


def _lanes(sizes: Sequence[int], blocks: Sequence[int], device: torch.device) -> Tensor:
    """How many lanes of each block count, of members of so many elements in so many blocks: [blocks, 1]."""
    lanes = torch.full((sum(blocks), 1), float(BLOCK), dtype=torch.float32)
    end = 0
    for size, count in zip(sizes, blocks, strict=True):
        end += count
        if size < count * BLOCK:
            filled, rest = divmod(size, BLOCK)
            lanes[end - count + filled : end] = 0.0
            if rest:
                lanes[end - count + filled] = float(rest)
    return lanes.to(device)


def _spread(member: Member, name: str, start: int, size: int, blocks: int) -> Tensor:
    """What is called `name`, for each of `size` elements from `start` on: [blocks, BLOCK].

    Behind the end the last one is repeated: a rule may divide by it, and what it makes of a 0 there would be part of
    the last block's scale.
    """
    kind, values = member.wide[name]
    columns = member.parameter.columns
    if kind == "elements":
        assert member.share is not None
        flat = values[start - member.share.fragment.start :][:size]
    else:
        first, before = divmod(start, columns)
        rows = -(-(before + size) // columns)
        grid = values[first : first + rows, None] if kind == "rows" else values[None, :]
        flat = grid.expand(rows, columns).reshape(-1)[before : before + size]
    spread = flat.new_empty(blocks * BLOCK)
    spread[:size], spread[size:] = flat, flat[-1]
    return spread.view(blocks, BLOCK)


def stretches(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Cuts of `size` elements (begin, elements): whole blocks, `most` elements at most, and what is left of a block."""
    whole = size // BLOCK * BLOCK
    yield from ((at, min(most, whole - at)) for at in range(0, whole, most))
    if whole < size:
        yield whole, size - whole
