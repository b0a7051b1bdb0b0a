"""What a step finds out before it updates, for a rule that looks at more than one element: means, and small states.

Each measuring pass goes over what this rank holds; sums are by owner (a parameter, a row or column of it, a component,
the model) and go over the ranks once for all parameters.

A pass is one compiled kernel. Sums over whole parameters leave it as one number for each block. Rows and columns do not
fit blocks: elements go through a buffer of CHUNK elements for each such mean, and come back through one, so that
nothing of the parameter's size is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.kernel import StepFunction, step_function
from toolkit.optim.rule import Mean, Rule
from toolkit.optim.streaming import StreamedStep, TensorStep
from toolkit.state.codecs import BLOCK
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

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Give `parts[r]` to rank r, flat; what each rank has given this one, of these sizes."""
        ...


class Alone:
    """One process that holds everything."""

    size, number = 1, 0

    def add(self, tensor: Tensor) -> Tensor:
        return tensor

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        return list(parts)


@dataclass(frozen=True)
class Parameter:
    """A whole parameter: rows along its first dimension, columns along all others; a 1-D one is one row."""

    shape: tuple[int, ...]
    component: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return lines(self.shape, "columns")

    @property
    def rows(self) -> int:
        return lines(self.shape, "rows")


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

    `small` are the states of its rows and columns, by name, updated in place.
    """

    parameter: Parameter
    step: TensorStep
    small: dict[str, Tensor]
    fragments: Sequence[Fragment]
    share: Share | None
    numbers: dict[str, Tensor] = field(default_factory=dict)  # found so far, 0-d
    wide: dict[str, tuple[str, Tensor]] = field(default_factory=dict)  # with "rows" or "columns" or "elements"

    def update(self, scale: Tensor) -> None:
        """Update weights and state; the gradient is let go of."""
        for _ in run(self, "update", scale):
            pass
        if self.share is not None:
            self.share.gradient = self.share.gradient[:0]


def small_states(
    rule: type[Rule], parameters: Sequence[Parameter], state: dict[str, Tensor], device: torch.device
) -> list[dict[str, Tensor]]:
    """The small states of each of the `parameters` of one tensor: views into its `state`, where they are kept."""
    found: list[dict[str, Tensor]] = [{} for _ in parameters]
    for small in rule.states:
        if small.of is not None:
            sizes = [lines(parameter.shape, small.of) for parameter in parameters]
            if small.name not in state:
                state[small.name] = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
            for views, view in zip(found, state[small.name].split(sizes), strict=True):
                views[small.name] = view
    return found


# ---- means --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _places(
    means: tuple[Mean, ...], parameters: tuple[Parameter, ...]
) -> tuple[list[list[slice]], list[int], list[int]]:
    """Where sums lie: a slice by mean and parameter. By slice, in order, its length and the elements of each sum."""
    found: dict[object, slice] = {}
    number: dict[object, int] = {}
    lengths: list[int] = []
    counts: list[int] = []
    places: list[list[slice]] = []
    end = 0
    for index, mean in enumerate(means):
        places.append([])
        for own, parameter in enumerate(parameters):
            length, count = {
                "row": (parameter.rows, parameter.columns),
                "column": (parameter.columns, parameter.rows),
            }.get(mean.over, (1, parameter.numel))
            owner = {"component": parameter.component, "model": None}.get(mean.over, own)
            if (index, owner) not in found:
                found[index, owner], number[index, owner] = slice(end, end + length), len(lengths)
                end += length
                lengths.append(length)
                counts.append(0)
            counts[number[index, owner]] += count
            places[-1].append(found[index, owner])
    return places, lengths, counts


def find_means(members: Sequence[Member], scale: Tensor, ranks: Ranks) -> None:
    """Every measuring pass of the rule, one after the other, and its small states after the first."""
    rule = members[0].step.function.rule
    for number, (function, means) in enumerate(rule.passes().items()):
        _measure(members, function, means, scale, ranks)
        if number == 0:
            _follow(rule, members)


def _measure(members: Sequence[Member], function: str, means: tuple[Mean, ...], scale: Tensor, ranks: Ranks) -> None:
    slices, lengths, counts = _places(means, tuple(member.parameter for member in members))
    device = members[0].step.theta.device
    sums = torch.zeros(sum(lengths), dtype=torch.float64, device=device)
    for number, member in enumerate(members):
        for start, results in run(member, function, scale):
            for mean, places, result in zip(means, slices, results, strict=True):
                _add(sums[places[number]], mean, member.parameter, start, result.to(device))
    counted = torch.repeat_interleave(torch.tensor(counts, dtype=torch.float64), torch.tensor(lengths))
    found = (ranks.add(sums) / counted.to(device, non_blocking=True)).float()
    for number, member in enumerate(members):
        here = member.step.theta.device
        for mean, places in zip(means, slices, strict=True):
            value = found[places[number]].to(here)
            if mean.over in ("row", "column"):
                member.wide[mean.name] = (mean.over + "s", value)
            else:
                member.numbers[mean.name] = value.squeeze(0)


def _add(sums: Tensor, mean: Mean, parameter: Parameter, start: int, values: Tensor) -> None:
    """Add to `sums` what has been measured: sums of blocks, or a value for each element from `start` on."""
    if mean.over not in ("row", "column"):
        sums += values.sum(dtype=torch.float64)
        return
    columns = parameter.columns
    first, before = divmod(start, columns)
    rows = -(-(before + values.numel()) // columns)
    if before or values.numel() % columns:
        padded = values.new_zeros(rows * columns)
        padded[before : before + values.numel()] = values
        values = padded
    grid = values.view(rows, columns)
    if mean.over == "row":
        sums[first : first + rows] += grid.sum(1)
    else:
        sums += grid.sum(0)


def _follow(rule: type[Rule], members: Sequence[Member]) -> None:
    """The small states of every parameter after the first pass, on every rank."""
    for member in members:
        if member.small:
            scalars = dict(zip(member.step.function.names, member.step.scalars.unbind(), strict=True))
            means = member.numbers | {name: value for name, (_, value) in member.wide.items()}
            new = rule.follow(*(state.clone() for state in member.small.values()), **scalars, **means)
            for (name, state), value in zip(member.small.items(), new, strict=True):
                if value.shape != state.shape:  # which copying would repeat
                    raise UserError(
                        f"{rule.__name__}.follow returns {list(value.shape)} for state {name!r}, which is "
                        f"{list(state.shape)}"
                    )
                state.copy_(value)
            kinds = {state.name: state.of for state in rule.states if state.of is not None}
            member.wide |= {name: (str(kinds[name]), value) for name, value in member.small.items()}


# ---- passes over what this rank holds -----------------------------------------------------------------------------


def run(member: Member, function: str, scale: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Run a function of the rule over this rank's share of a parameter.

    Yields, for one stretch after the other, the element of the parameter that it begins with and the results of a
    measuring function: for each element, flat, or sums of blocks.
    """
    share, step = member.share, member.step
    if share is None:
        return
    first = step.function
    kernel: StepFunction = (
        first if function == "update" else step_function(first.rule, first.names, first.layout, function)
    )
    given = [member.numbers[name] for name in kernel.numbers]
    scalars = torch.cat([step.scalars, torch.stack(given)]) if given else step.scalars
    begin, offset, total = share.fragment.start, share.fragment.offset, share.fragment.numel
    most = CHUNK if any(kernel.wide) else total
    for at, size in _stretches(total, most):
        blocks = blocks_of(size)
        theta = step.theta[offset + at : offset + at + size]
        results = [theta.new_zeros(blocks, BLOCK if one else 1, dtype=torch.float32) for one in kernel.results]
        lanes = [] if all(kernel.results) else [_lanes(size, blocks, theta.device)]
        wide = [_spread(member, name, begin + at, size, blocks) for name in kernel.spread]
        parts = _Parts(step, offset + at, size)
        rounding = (step.seed, step.step, share.first_block + at // BLOCK)
        stretch = StreamedStep(kernel, step.compiled, theta, [*parts.held, *results, *lanes, *wide], scalars, rounding)
        stretch.apply(0, share.gradient[at : at + size], scale.to(theta.device))
        if function == "update":
            parts.write_back()
        yield begin + at, [x.view(-1)[:size] if x.shape[1] == BLOCK else x for x in results]


def _lanes(size: int, blocks: int, device: torch.device) -> Tensor:
    """How many lanes of each block there are: fewer in the last one."""
    lanes = torch.full((blocks, 1), float(BLOCK), dtype=torch.float32, device=device)
    lanes[-1:].fill_(float(size - (blocks - 1) * BLOCK))
    return lanes


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


def _stretches(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Cuts of `size` elements (begin, elements): whole blocks, `most` elements at most, and what is left of a block."""
    whole = size // BLOCK * BLOCK
    yield from ((at, min(most, whole - at)) for at in range(0, whole, most))
    if whole < size:
        yield whole, size - whole


class _Parts:
    """The stored tensors for `size` elements from `offset` on: views of whole blocks, else copies.

    1-D parameters lie in one tensor without regard to blocks. Their state is kept exactly, one number for each lane.
    """

    def __init__(self, step: TensorStep, offset: int, size: int) -> None:
        first, blocks = offset // BLOCK, blocks_of(size)
        self._own: list[Tensor] = []
        if offset % BLOCK == 0 and (size % BLOCK == 0 or any(part.shape[1] != BLOCK for part in step.parts)):
            self.held = [part[first : first + blocks] for part in step.parts]
            return
        assert all(part.shape[1] == BLOCK for part in step.parts), "a block belongs to one parameter"
        self._own = [part.view(-1)[offset : offset + size] for part in step.parts]
        self.held = []
        for own in self._own:
            copied = own.new_zeros(blocks * BLOCK)
            copied[:size] = own
            self.held.append(copied.view(blocks, BLOCK))

    def write_back(self) -> None:
        """Put what was copied where it belongs."""
        for own, held in zip(self._own, self.held, strict=False):
            own.copy_(held.view(-1)[: own.numel()])
