"""One rank's flat tensors, made from a checkpoint that may have been cut, kept or trained otherwise.

Where a parameter begins at a block in both, and nothing else changes, its codes and scales are copied as they are.
Where its blocks begin elsewhere (stages 1 and 2 lay blocks over a parameter group, stage 3 over each parameter: a
difference where a matrix is no multiple of 256 elements), or its format changes, it is decoded and encoded again.
Weights with their remainders, and fp32 state, are numbers of their own and always the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from toolkit.checkpoint.source import Source
from toolkit.state.codecs import BLOCK, Codec, pack
from toolkit.state.layout import REMAINDER, Layout, State
from toolkit.state.remainders import MASTER
from toolkit.state.sharding import Place, Sharding

WEIGHTS = ""
"""Key of the flat tensor itself among the tensors of a rank."""


class Transfer:
    """From `source` to `target`: what changes, and the tensors of any rank."""

    def __init__(self, source: Source, target: Sharding) -> None:
        self.source = source
        self.target = target

    def mismatch(self, frozen: Collection[str]) -> str | None:
        """Which parameters are not the same, in half a sentence; None if they are. `frozen`: those not trained here."""
        there, here = self.source.sharding.by_name, self.target.by_name
        for names, then, now in (
            (here.keys() & self.source.frozen.keys(), "frozen in the checkpoint", "trained"),
            (there.keys() & set(frozen), "trained in the checkpoint", "frozen"),
        ):
            if names:
                return (
                    f"{len(names)} of the parameters were {then} and are {now} here, {min(names)!r} for one; freeze "
                    "the same ones, or export the model and start a new run with its weights"
                )
        for names, where in (
            (here.keys() - there.keys(), "the checkpoint lacks"),
            (there.keys() - here.keys(), "this model lacks"),
        ):
            if names:
                return f"{where} {len(names)} of the parameters, {min(names)!r} for one"
        for name, (_, place) in here.items():
            if place.shape != there[name][1].shape:
                return f"{name!r} is {list(there[name][1].shape)} in the checkpoint and {list(place.shape)} here"
        return None

    def conversions(self) -> list[str]:
        """What is not taken over as it is, a sentence each: optimizer, formats, weights."""
        there, here = self.source.sharding, self.target
        said: dict[str, None] = {}  # a set in order
        if there.states != here.states or there.rule != here.rule:
            pairs = ", ".join(f"{state.name} from {self._origin(state)}" for state in here.states)
            said[f"the optimizer was {there.rule or 'Adam'} and is {here.rule or 'Adam'}: {pairs}"] = None
        for index, flat in enumerate(here.flats):
            for place in flat.places:
                old_index, _ = there.by_name[place.name]
                old, kept, before = there.flats[old_index], self._layout(index), there.layout(old_index)
                codecs = dict(zip((s.name for s in before.states), before.codecs, strict=True))
                for state, codec in zip(kept.states, kept.codecs, strict=True):
                    origin = self._origin(state) or ""
                    was = codecs.get(origin)
                    if was is not None and was != codec:
                        then, now = _kept_as(old.formats[origin], was), _kept_as(flat.formats[state.name], codec)
                        said[f"{state.name} was kept as {then} and is now {now}"] = None
                if _weights(before, old.dtype) != _weights(kept, flat.dtype):
                    said[f"weights were {_weights(before, old.dtype)} and are {_weights(kept, flat.dtype)}"] = None
        return list(said)

    def regridded(self) -> list[str]:
        """Parameters whose formats stay, but whose compressed state is decoded and encoded on other blocks."""
        found = []
        for index, flat in enumerate(self.target.flats):
            if self._same_formats(index) and not self._exact(index):
                found += [place.name for place in flat.places]
        return found

    def tensors(self, index: int, rank: int) -> dict[str, Tensor]:
        """What `rank` holds of flat tensor `index`: the tensor (key WEIGHTS), its state by key; padding is zero.

        States are [blocks, per_block] as `Layout.allocate` makes them. Without state in the checkpoint (no step has
        been made) there is the flat tensor alone.
        """
        flat, kept = self.target.flats[index], self._layout(index)
        made = {WEIGHTS: torch.zeros(flat.size, dtype=flat.torch_dtype)}
        trained = self.source.trained()
        if trained:
            made |= kept.allocate(flat.size, torch.device("cpu"))
        self._fill_weights(made, index, rank, kept)
        if trained and self._exact(index):
            self._copy_states(made, index, rank, kept)
        elif trained:
            self._encode_states(made, index, rank, kept)
        return made

    def step_of(self, index: int) -> int:
        """Optimizer steps of flat tensor `index`."""
        return self.source.step_of(self._old(index))

    # ---- weights ------------------------------------------------------------------------------------------------

    def _fill_weights(self, made: dict[str, Tensor], index: int, rank: int, kept: Layout) -> None:
        flat, source = self.target.flats[index], self.source
        keys = kept.keys(REMAINDER) if kept.remainder is not None and len(made) > 1 else []
        parts = kept.remainder.specs() if kept.remainder is not None else ()
        rows = -(-flat.size // BLOCK)
        low = [torch.zeros(rows * BLOCK, dtype=made[key].dtype) for key in keys]
        for piece in self.target.pieces(index, rank):
            old_index, _ = source.sharding.by_name[piece.name]
            here, between = slice(piece.offset, piece.offset + piece.stop - piece.start), (piece.start, piece.stop)
            same_dtype = source.sharding.flats[old_index].dtype == flat.dtype
            if source.sharding.layout(old_index).remainder == kept.remainder and same_dtype:
                made[WEIGHTS][here] = source.elements(piece.name, None, *between)
                for key, part, lanes in zip(keys, parts, low, strict=False):
                    lanes[here] = source.lanes(piece.name, key, part.per_block, *between)
                continue
            theta = source.weights(piece.name, *between)
            split = kept.remainder.split(theta) if kept.remainder is not None else (theta.to(flat.torch_dtype),)
            made[WEIGHTS][here] = split[0]
            for lanes, value in zip(low, split[1:], strict=False):
                lanes[here] = value
        for key, part, lanes in zip(keys, parts, low, strict=False):
            whole = lanes.view(rows, BLOCK)
            made[key] = whole if part.per_block == BLOCK else pack(whole.split(BLOCK // 2, dim=1))

    # ---- states -------------------------------------------------------------------------------------------------

    def _copy_states(self, made: dict[str, Tensor], index: int, rank: int, kept: Layout) -> None:
        for state, codec in zip(kept.states, kept.codecs, strict=True):
            for key in kept.keys(state.name):
                if codec.scaled:
                    self._copy_blocks(made[key], key, index, rank)
                    continue
                flat = made[key].view(-1)
                for piece in self.target.pieces(index, rank):
                    size = piece.stop - piece.start
                    flat[piece.offset : piece.offset + size] = self.source.elements(
                        piece.name, key, piece.start, piece.stop
                    )

    def _copy_blocks(self, into: Tensor, key: str, index: int, rank: int) -> None:
        old, flat = self._old(index), self.target.flats[index]
        if self._same_grid(index):
            rows = self.source.sharding.flats[old].size * self.source.sharding.world_size // BLOCK
            per_rank = flat.size // BLOCK
            first, last = min(rank * per_rank, rows), min((rank + 1) * per_rank, rows)
            if first < last:
                into[: last - first] = self.source.flat_blocks(old, key, first, last)
            return
        for piece in self.target.pieces(index, rank):
            first, last = piece.start // BLOCK, -(-piece.stop // BLOCK)
            at = piece.offset // BLOCK
            into[at : at + last - first] = self.source.blocks(piece.name, key, first, last)

    def _encode_states(self, made: dict[str, Tensor], index: int, rank: int, kept: Layout) -> None:
        size = -(-self.target.flats[index].size // BLOCK) * BLOCK
        values = {state.name: torch.zeros(size) for state in kept.states}
        for piece in self.target.pieces(index, rank):
            decoded = self.source.states(piece.name, piece.start, piece.stop)
            for state in kept.states:
                origin = self._origin(state)
                if origin is not None:
                    stop = piece.offset + piece.stop - piece.start
                    values[state.name][piece.offset : stop] = decoded[origin]
        made.update(kept.encode({name: value.view(-1, BLOCK) for name, value in values.items()}))

    def _origin(self, state: State) -> str | None:
        """The state of the checkpoint that `state` is taken from: its namesake, else the first of its kind."""
        there = self.source.sharding.states
        names = [old.name for old in there]
        alike = [old.name for old in there if old.signed == state.signed]
        return state.name if state.name in names else next(iter(alike), None)

    def _exact(self, index: int) -> bool:
        """Whether every code of flat tensor `index` can be copied."""
        kept = self._layout(index)
        if not self._same_formats(index):
            return False
        return not any(codec.scaled for codec in kept.codecs) or self._same_grid(index) or self._aligned(index)

    def _same_formats(self, index: int) -> bool:
        there, kept = self.source.sharding, self._layout(index)
        olds = {there.by_name[place.name][0] for place in self.target.flats[index].places}
        return all((there.layout(old).states, there.layout(old).codecs) == (kept.states, kept.codecs) for old in olds)

    def _same_grid(self, index: int) -> bool:
        """Whether both lay one grid over the same parameters at the same places (stages 1 and 2)."""
        there = self.source.sharding
        return 3 not in (there.stage, self.target.stage) and _where(self.target.flats[index].places) == _where(
            there.flats[self._old(index)].places
        )

    def _aligned(self, index: int) -> bool:
        """Whether every parameter of a flat tensor has blocks of its own, here and in the checkpoint."""
        there = self.source.sharding
        if there.stage == 3 and self.target.stage == 3:
            return True
        for place in self.target.flats[index].places:
            _, old = there.by_name[place.name]
            if place.numel % BLOCK or there.grid_offset(old) % BLOCK or self.target.grid_offset(place) % BLOCK:
                return False
        return True

    def _old(self, index: int) -> int:
        """The flat tensor of the checkpoint that holds the first parameter of flat tensor `index`."""
        return self.source.sharding.by_name[self.target.flats[index].places[0].name][0]

    def _layout(self, index: int) -> Layout:
        return self.target.layout(index)


def _where(places: Iterable[Place]) -> list[tuple[str, int]]:
    return [(place.name, place.offset) for place in places]


def _kept_as(state_format: str, codec: Codec) -> str:
    """A format, and what it codes where that is not the state itself."""
    return f"{state_format} (the difference from another state)" if codec.relative else state_format


def _weights(kept: Layout, dtype: str) -> str:
    """Formats of weights are those of `optimizer.params.weights`; without remainder, the type that they have."""
    return kept.remainder.name if kept.remainder is not None else MASTER if dtype == "float32" else dtype
