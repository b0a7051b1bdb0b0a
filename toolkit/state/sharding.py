"""Where every element of every parameter lies in the flat tensors of all ranks, at any ZeRO stage.

DeepSpeed hands the optimizer flat tensors. At stages 1 and 2 there is one for each parameter group, the parameters one
after the other, cut into equal parts for the ranks; at stage 3 each parameter is cut, and a rank's flat tensor is its
parts one after the other. A `Sharding` says this in numbers, so that files can be read and written, for any number of
ranks, without DeepSpeed and without a process group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from toolkit.state.codecs import BLOCK
from toolkit.state.layout import Layout, State, layout_of
from toolkit.state.remainders import MASTER


@dataclass(frozen=True)
class Place:
    """A parameter in a flat tensor.

    `offset` counts from the start of the whole flat tensor at stages 1 and 2, of every rank's own at stage 3. `part`
    is what a rank holds of the parameter at stage 3, padding included; 0 at stages 1 and 2.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    part: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of parameter `name` lie from `offset` on in one rank's flat tensor."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Flat:
    """One flat tensor: `size` elements on each rank, in `dtype`, of parameter group `group`."""

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
    """All flat tensors of a run. `rule` is None for an optimizer of torch's or DeepSpeed's, with fp32 state."""

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
        """What is stored for flat tensor `index`."""
        flat = self.flats[index]
        return layout_of(self.states, flat.formats, flat.weights if flat.dtype == "bfloat16" else MASTER)

    def pieces(self, index: int, rank: int) -> list[Piece]:
        """What of which parameter `rank` holds in flat tensor `index`, padding left out."""
        flat, found = self.flats[index], []
        for place in flat.places:
            if self.stage == 3:
                start, offset = rank * place.part, place.offset
                stop = min(start + place.part, place.numel)
            else:
                start = max(rank * flat.size - place.offset, 0)
                stop = min((rank + 1) * flat.size - place.offset, place.numel)
                offset = place.offset + start - rank * flat.size
            if start < stop:
                found.append(Piece(place.name, start, stop, offset))
        return found

    def ranges(self, index: int, place: Place, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(rank, first, last) of the flat tensors that hold elements `start` to `stop` of a parameter, in order.

        `stop` may reach into the padding behind the parameter, but not past the last rank's.
        """
        if self.stage == 3:
            size, shift, local = place.part, 0, place.offset
        else:
            size, shift, local = self.flats[index].size, place.offset, 0
        at, end = start + shift, min(stop + shift, size * self.world_size)
        while at < end:
            rank = at // size
            last = min(end, (rank + 1) * size)
            yield rank, at - rank * size + local, last - rank * size + local
            at = last

    def grid_offset(self, place: Place) -> int:
        """Where a parameter begins in its grid of blocks: at stage 3 the grid restarts at each parameter."""
        return 0 if self.stage == 3 else place.offset

    def to_json(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {
            "stage": self.stage,
            "world_size": self.world_size,
            "rule": self.rule,
            "states": [{"name": s.name, "signed": s.signed, "residual_of": s.residual_of} for s in self.states],
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
                        | ({"elements_per_rank": p.part} if self.stage == 3 else {})
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


def part_of(shape: tuple[int, ...], world_size: int) -> int:
    """Elements of a parameter on each rank at stage 3; 1-D ones have fp32 state and no blocks."""
    unit = world_size * (BLOCK if len(shape) > 1 else 1)
    return -(-math.prod(shape) // unit) * unit // world_size


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
            part = part_of(place.shape, world_size) if stage == 3 else 0
            places.append(Place(place.name, place.shape, at, part))
            at += part or place.numel
        # As `ShardedZeroOptimizer`: DeepSpeed aligns to 2 N elements, this package to whole blocks for each rank.
        unit = math.lcm(2 * world_size, BLOCK * world_size)
        size = at if stage == 3 else -(-at // unit) * unit // world_size
        flats.append(
            Flat(number, first.component, size, first.dtype, first.weights, first.formats, tuple(places)),
        )
    return Sharding(stage, world_size, sharding.rule, sharding.states, tuple(flats))
