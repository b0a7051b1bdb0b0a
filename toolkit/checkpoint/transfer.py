"""One rank's flat tensors, made from a checkpoint that may have been cut, kept or trained otherwise.

A parameter has the same blocks at every stage and number of ranks, so its codes and scales are copied as they are.
Only where its format changes it is decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from toolkit.checkpoint.source import Source
from toolkit.errors import some
from toolkit.state.codecs import BLOCK, FACTORED, Codec, pack
from toolkit.state.files import StateFiles
from toolkit.state.layout import REMAINDER, Layout, State, kept_whole, lines_of
from toolkit.state.remainders import MASTER
from toolkit.state.sharding import Flat, Fragment, Place, Sharding, blocks_of, lines

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
        whole = (set(there.states), set(here.states))
        if whole[0] != whole[1] or there.rule != here.rule:
            pairs = _pairs(here.states, there.states)
            said[f"the optimizer was {there.rule or 'Adam'} and is {here.rule or 'Adam'}: {pairs}"] = None
        moved: dict[str, list[str]] = {}
        for index, flat in enumerate(here.flats):
            for place in flat.places:
                old_index, _ = there.by_name[place.name]
                old, kept, before = there.flats[old_index], here.layout(index), there.layout(old_index)
                states = (set(there.kept(old_index)), set(here.kept(index)))
                if states[0] != states[1] and states != whole:
                    moved.setdefault(_pairs(here.kept(index), there.kept(old_index)), []).append(place.name)
                now_kept, was_kept = _codecs(kept), _codecs(before)
                for state in kept.every:
                    origin, codec = _origin(state, before.every) or "", now_kept[state.name]
                    was = was_kept.get(origin)
                    if was is not None and was != codec:
                        then, now = _kept_as(old.formats[origin], was), _kept_as(flat.formats[state.name], codec)
                        said[f"{state.name} was kept as {then} and is now {now}"] = None
                if _weights(before, old.dtype) != _weights(kept, flat.dtype):
                    said[f"weights were {_weights(before, old.dtype)} and are {_weights(kept, flat.dtype)}"] = None
        for pairs, names in moved.items():
            said[f"{some(names, 3)}: other states are kept than in the checkpoint ({pairs or 'none'})"] = None
        return list(said)

    def tensors(self, index: int, rank: int, files: StateFiles | None = None) -> dict[str, Tensor]:
        """What `rank` holds of flat tensor `index`: the tensor (key WEIGHTS), its state by key; padding is zero.

        States are [blocks, per_block] as `Layout.allocate` makes them, those of rows and columns 1-D, whole for every
        rank. Without state in the checkpoint (no step has been made) there is the flat tensor alone. The state of
        single elements is made in `files`, where that is given.
        """
        flat, kept = self.target.flats[index], self.target.layout(index)
        made = {WEIGHTS: torch.zeros(flat.size, dtype=flat.torch_dtype)}
        if self.source.trained():
            made |= kept.allocate(flat.size, torch.device("cpu"), files)
            made |= self._small_states(index)
        for place, fragment in self.target.on_rank(index, rank):
            self._fill_weights(made, flat, kept, place.name, fragment)
            if self.source.trained():
                self._fill_states(made, kept, place.name, fragment)
        return made

    def step_of(self, index: int) -> int:
        """Optimizer steps of flat tensor `index`."""
        return self.source.step_of(self._old(index))

    def _fill_weights(self, made: dict[str, Tensor], flat: Flat, kept: Layout, name: str, fragment: Fragment) -> None:
        """Weights, and their remainder where there is state."""
        source, between = self.source, (fragment.start, fragment.stop)
        old_index, _ = source.sharding.by_name[name]
        keys = kept.keys(REMAINDER) if kept.remainder is not None and len(made) > 1 else []
        same_dtype = source.sharding.flats[old_index].dtype == flat.dtype
        if source.sharding.layout(old_index).remainder == kept.remainder and same_dtype:
            made[WEIGHTS][fragment.elements] = source.elements(name, None, *between)
            for key in keys:
                self._copy(made[key], name, key, fragment, by_block=made[key].shape[1] != BLOCK)
            return
        theta = source.weights(name, *between)
        split = kept.remainder.split(theta) if kept.remainder is not None else (theta.to(flat.torch_dtype),)
        made[WEIGHTS][fragment.elements] = split[0]
        for key, value in zip(keys, split[1:], strict=False):
            _put(made[key], fragment, value)

    def _fill_states(self, made: dict[str, Tensor], kept: Layout, name: str, fragment: Fragment) -> None:
        old = self.source.sharding.layout(self.source.sharding.by_name[name][0])
        if (old.states, old.codecs) == (kept.states, kept.codecs):
            for state, codec in zip(kept.states, kept.codecs, strict=True):
                for key in kept.keys(state.name):
                    self._copy(made[key], name, key, fragment, by_block=codec.scaled)
            return
        decoded = self.source.states(name, fragment.start, fragment.stop)
        values = {}
        for state in kept.states:
            origin = _origin(state, old.every)
            whole = torch.zeros(blocks_of(fragment.numel) * BLOCK)
            if origin is not None:
                whole[: fragment.numel] = decoded[origin]
            values[state.name] = whole.view(-1, BLOCK)
        for key, stored in kept.encode(values).items():
            if kept.blocked:
                made[key][fragment.blocks] = stored
            else:
                made[key].view(-1)[fragment.elements] = stored.view(-1)[: fragment.numel]

    def _small_states(self, index: int) -> dict[str, Tensor]:
        flat, found = self.target.flats[index], {}
        means = {line.name: state for _, state in self.target.layout(index).factored for line in lines_of(state.name)}
        for state in kept_whole(self.target.kept(index), flat.formats):
            found[state.name] = torch.cat([self._small(state, place, means.get(state.name)) for place in flat.places])
        return found

    def _small(self, state: State, place: Place, of: State | None) -> Tensor:
        """A state of rows, columns or one number of a parameter; `of`: the state whose rows or columns these are."""
        source, size = self.source, lines(place.shape, str(state.of))
        old, _ = source.sharding.by_name[place.name]
        there = source.small(place.name)
        if of is None:
            origin = _origin(state, source.sharding.kept(old))
            return torch.zeros(size) if origin is None else there[origin]
        origin = _origin(of, source.sharding.layout(old).every)
        if origin is None:
            return torch.zeros(size)
        kept = next(line.name for line in lines_of(origin) if line.of == state.of)
        if kept in there:
            return there[kept]
        whole = source.states(place.name, 0, place.numel)[origin].view(-1, lines(place.shape, "columns"))
        return whole.mean(1 if state.of == "rows" else 0)

    def _copy(self, into: Tensor, name: str, key: str, fragment: Fragment, *, by_block: bool) -> None:
        if by_block:
            into[fragment.blocks] = self.source.blocks(name, key, fragment.start // BLOCK, blocks_of(fragment.stop))
        else:
            into.view(-1)[fragment.elements] = self.source.elements(name, key, fragment.start, fragment.stop)

    def _old(self, index: int) -> int:
        """The flat tensor of the checkpoint that holds the first parameter of flat tensor `index`."""
        return self.source.sharding.by_name[self.target.flats[index].places[0].name][0]


def _pairs(states: Sequence[State], there: Sequence[State]) -> str:
    return ", ".join(f"{state.name} from {_origin(state, there)}" for state in states)


def _origin(state: State, there: Sequence[State]) -> str | None:
    """Which of the states `there` `state` is taken from: its namesake, else the first of its kind."""
    there = [old for old in there if old.of == state.of]
    names = [old.name for old in there]
    alike = [old.name for old in there if old.signed == state.signed]
    return state.name if state.name in names else next(iter(alike), None)


def _put(into: Tensor, fragment: Fragment, lanes: Tensor) -> None:
    """Write a remainder, a value for every element, into its stored tensor."""
    if into.shape[1] == BLOCK:
        into.view(-1)[fragment.elements] = lanes
        return
    whole = lanes.new_zeros(blocks_of(fragment.numel) * BLOCK)
    whole[: fragment.numel] = lanes
    (into[fragment.blocks],) = pack(whole.view(-1, BLOCK).split(BLOCK // 2, dim=1))


def _codecs(kept: Layout) -> dict[str, Codec | str]:
    """How each state is kept: its codec, or FACTORED."""
    coded: dict[str, Codec | str] = dict(zip((state.name for state in kept.states), kept.codecs, strict=True))
    return coded | {state.name: FACTORED for _, state in kept.factored}


def _kept_as(state_format: str, codec: Codec | str) -> str:
    """A format, and what it codes where that is not the state itself."""
    relative = isinstance(codec, Codec) and codec.relative
    return f"{state_format} (the difference from another state)" if relative else state_format


def _weights(kept: Layout, dtype: str) -> str:
    """Formats of weights are those of `optimizer.params.weights`; without remainder, the type that they have."""
    return kept.remainder.name if kept.remainder is not None else MASTER if dtype == "float32" else dtype
