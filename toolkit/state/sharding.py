"""Where every element of every parameter lies in the flat tensors of all ranks, at any ZeRO stage.

DeepSpeed hands the optimizer flat tensors. At stages 1 and 2 there is one for each parameter group, the parameters one
after the other, cut into equal parts for the ranks; at stage 3 each parameter is cut, and a rank's flat tensor is its
parts one after the other. Either way a block of a matrix belongs to it alone, and begins at the same of its elements:
sizes are padded to whole blocks, and a matrix of another size is a group of its own. A `Sharding` says this in numbers,
so that files can be read and written, for any number of ranks, without DeepSpeed and without a process group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from toolkit.state.codecs import BLOCK
from toolkit.state.layout import Layout, State, kept_whole, layout_of
from toolkit.state.remainders import MASTER


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole parameter: under ZeRO-3 the tensor at hand is an empty shell."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def blocks_of(numel: int) -> int:
    """Blocks that hold `numel` elements."""
    return -(-numel // BLOCK)


def shard_size(numel: int, world_size: int, unit: int = BLOCK) -> int:
    """Elements on each rank of `numel` in all, padding included, where every rank has whole units."""
    return -(-numel // (unit * world_size)) * unit


def share_of(shape: Sequence[int], world_size: int) -> int:
    """Elements of a parameter on each rank at stage 3, padding included; 1-D ones have fp32 state and no blocks."""
    return shard_size(math.prod(shape), world_size, BLOCK if len(shape) > 1 else 1)


def matrices_of(shape: Sequence[int]) -> tuple[int, int, int]:
    """How many matrices a parameter is, of how many rows and columns each.

    Three dimensions are a stack of matrices, as experts are. Else it is one: rows along the first dimension, columns
    along all others together; a 1-D parameter is one row.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    rows = shape[0] if len(shape) > 1 else 1
    return 1, rows, math.prod(shape[1:] if len(shape) > 1 else shape)


def lines(shape: Sequence[int], of: str) -> int:
    """How many "rows" or "columns" a parameter has; those of a stack have its matrices one below the other.

    As a "parameter" it is one.
    """
    if of == "parameter":
        return 1
    count, rows, columns = matrices_of(shape)
    return count * rows if of == "rows" else columns


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `stop` of a parameter: they lie from `offset` on in the flat tensor of `rank`.

    Of a matrix all three begin at a block, and no other parameter has elements in its blocks. 1-D parameters have no
    blocks of their own: their elements follow one another, and state is kept for each element by itself.
    """

    rank: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def elements(self) -> slice:
        """In the rank's flat tensor."""
        return slice(self.offset, self.offset + self.numel)

    @property
    def blocks(self) -> slice:
        """Of the rank's flat tensor; the last one may be filled in part."""
        return slice(self.offset // BLOCK, blocks_of(self.offset + self.numel))


def fragments(start: int, stop: int, *, size: int, shift: int = 0, before: int = 0) -> list[Fragment]:
    """Where elements `start` to `stop` of a parameter lie, in order, by rank.

    Args:
        size: elements of each rank of what is cut: a parameter group (stages 1 and 2) or the parameter (stage 3).
        shift: elements of what is cut that come before the parameter.
        before: elements that come before this in the flat tensor of each rank.
    """
    found = []
    while start < stop:
        rank = (start + shift) // size
        end = min(stop, (rank + 1) * size - shift)
        found.append(Fragment(rank, start, end, start + shift - rank * size + before))
        start = end
    return found


def held(rank: int, numel: int, *, size: int, shift: int = 0, before: int = 0) -> Fragment | None:
    """What `rank` holds of a parameter of `numel` elements, padding left out; arguments as of `fragments`."""
    start, stop = max(rank * size - shift, 0), min((rank + 1) * size - shift, numel)
    return Fragment(rank, start, stop, start + shift - rank * size + before) if start < stop else None


@dataclass(frozen=True)
class Place:
    """A parameter in a flat tensor.

    `offset` counts from the start of the whole flat tensor at stages 1 and 2, of every rank's own at stage 3. `share`
    is how many elements each rank has of the parameter at stage 3, padding included; 0 at stages 1 and 2.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    share: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Flat:
    """One flat tensor: `size` elements on each rank, in `dtype`, of parameter group `group`.

    `formats`: by state; variants of a rule keep different ones.
    """

    group: int
    component: str
    size: int
    dtype: str
    weights: str
    formats: Mapping[str, str]
    places: tuple[Place, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found


@dataclass(frozen=True)
class Sharding:
    """All flat tensors of a run, and the states of all of them together.

    `rule` is None for an optimizer of torch's or DeepSpeed's, with fp32 state.
    """

    stage: int
    world_size: int
    rule: str | None
    states: tuple[State, ...]
    flats: tuple[Flat, ...]

    @cached_property
    def by_name(self) -> dict[str, tuple[int, Place]]:
        """The number of the flat tensor that holds a parameter, and its place there."""
        return {place.name: (index, place) for index, flat in enumerate(self.flats) for place in flat.places}

    def layout(self, index: int) -> Layout:
        """What is stored by element for flat tensor `index`."""
        flat = self.flats[index]
        return layout_of(self.kept(index), flat.formats, flat.weights if flat.dtype == "bfloat16" else MASTER)

    def kept(self, index: int) -> tuple[State, ...]:
        """The states of flat tensor `index`: those that it has a format of."""
        return tuple(state for state in self.states if state.name in self.flats[index].formats)

    def small(self, index: int) -> dict[str, list[int]]:
        """The states of rows and columns of flat tensor `index`: how many numbers each of its parameters has, in order.

        One tensor holds them, whole on every rank; files hold that of the first rank.
        """
        shapes = [place.shape for place in self.flats[index].places]
        kept = kept_whole(self.kept(index), self.flats[index].formats)
        return {state.name: [lines(shape, str(state.of)) for shape in shapes] for state in kept}

    def fragments(self, index: int, place: Place, start: int = 0, stop: int | None = None) -> list[Fragment]:
        """Where elements `start` to `stop` of a parameter of flat tensor `index` lie, on all ranks."""
        end = place.numel if stop is None else stop
        if self.stage == 3:
            return fragments(start, end, size=place.share, before=place.offset)
        return fragments(start, end, size=self.flats[index].size, shift=place.offset)

    def on_rank(self, index: int, rank: int) -> list[tuple[Place, Fragment]]:
        """What `rank` holds in flat tensor `index`, padding left out."""
        flat, found = self.flats[index], []
        for place in flat.places:
            if self.stage == 3:
                fragment = held(rank, place.numel, size=place.share, before=place.offset)
            else:
                fragment = held(rank, place.numel, size=flat.size, shift=place.offset)
            if fragment is not None:
                found.append((place, fragment))
        return found

    def straddling(self) -> str | None:
        """A parameter whose first block is another one's as well, in whose flat tensor blocks matter."""
        for index, flat in enumerate(self.flats):
            if self.layout(index).blocked:
                for place in flat.places:
                    if place.offset % BLOCK and place.numel:
                        return place.name
        return None

    def to_json(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {
            "stage": self.stage,
            "world_size": self.world_size,
            "rule": self.rule,
            "states": [
                {"name": s.name, "signed": s.signed, "residual_of": s.residual_of} | ({"of": s.of} if s.of else {})
                for s in self.states
            ],
            "flat_tensors": [
                {
                    "group": flat.group,
                    "component": flat.component,
                    "elements_per_rank": flat.size,
                    "dtype": flat.dtype,
                    "weights": flat.weights,
                    "state_format": dict(flat.formats),
                    "parameters": [
                        {"name": p.name, "shape": list(p.shape), "offset": p.offset}
                        | ({"elements_per_rank": p.share} if self.stage == 3 else {})
                        for p in flat.places
                    ],
                }
                for flat in self.flats
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sharding:
        """The inverse of `to_json`."""
        flats = tuple(
            Flat(
                flat["group"],
                flat["component"],
                flat["elements_per_rank"],
                flat["dtype"],
                flat["weights"],
                flat["state_format"],
                tuple(
                    Place(p["name"], tuple(p["shape"]), p["offset"], p.get("elements_per_rank", 0))
                    for p in flat["parameters"]
                ),
            )
            for flat in value["flat_tensors"]
        )
        states = tuple(State(**state) for state in value["states"])
        return cls(value["stage"], value["world_size"], value["rule"], states, flats)


def reshard(sharding: Sharding, *, stage: int, world_size: int) -> Sharding:
    """The same parameter groups at another stage and number of ranks, as this package's engines lay them out."""
    groups: dict[int, list[tuple[Flat, Place]]] = {}
    for flat in sharding.flats:
        for place in flat.places:
            groups.setdefault(flat.group, []).append((flat, place))
    flats = []
    for number, members in groups.items():
        first, at, places = members[0][0], 0, []
        for _, place in members:
            share = share_of(place.shape, world_size) if stage == 3 else 0
            places.append(Place(place.name, place.shape, at, share))
            at += share or place.numel
        size = at if stage == 3 else shard_size(at, world_size)
        flats.append(
            Flat(number, first.component, size, first.dtype, first.weights, first.formats, tuple(places)),
        )
    return Sharding(stage, world_size, sharding.rule, sharding.states, tuple(flats))
