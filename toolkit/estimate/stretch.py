"""The dry run of a model whose layers are all alike, from that of a model with few of them.

What a layer does repeats, shifted in time: once per layer in the forward pass, and in reverse order in the backward
pass. So a dry run of LAYERS layers, in which one layer's events are repeated for those that lack, is the dry run of the
whole model, event by event, in a fraction of the time. Whether layers do repeat is looked at, not assumed: where they
differ the whole model is run.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from toolkit.estimate.dry_run import Call, DryRun, Parameter, dry_run, pass_of
from toolkit.memory.storages import Lifetime, StorageTrace
from toolkit.models.build import CausalLM, blocks, blueprint
from toolkit.records import categories as c

LAYERS = 8
"""Of the short model: what is special of the first and of the last may reach two layers further."""
_MIDDLE = 3
"""The layer that is repeated in the forward pass; in the backward pass as many have gone before what is repeated."""

_OF_THE_MODEL = ("dtype", "activations", "loss", "attention", "lora")
_OTHER = ("layer_idx", "stands_for")
"""A layer's number, and what a dry run sets."""
_SIMPLE = (int, float, str, bool, type(None), tuple)


def dry_run_of(model: str, **settings: Any) -> DryRun:
    """As `dry_run`, whose arguments (but `layers`) and errors these are."""
    whole = blueprint(model, **{key: settings[key] for key in _OF_THE_MODEL if key in settings})
    layers = _layers(whole)
    if len(layers) > LAYERS + 1 and _alike([layer for _, layer in layers]):
        short = dry_run(model, layers=LAYERS, **settings)
        few = _layers(short.model)
        if len(few) == LAYERS and _alike([few[0][1], layers[0][1]]):
            found = stretched(short, whole)
            if found is not None:
                return found
    return pass_of(whole, **{key: value for key, value in settings.items() if key not in _OF_THE_MODEL})


def _layers(model: CausalLM) -> list[tuple[str, nn.Module]]:
    """The members of the one list of blocks that a model has, with their names; none if there are several lists."""
    found = [(name, block) for name, block in blocks(model) if name.rsplit(".", 1)[-1].isdigit()]
    return found if len({name.rsplit(".", 1)[0] for name, _ in found}) == 1 else []


def _alike(layers: list[nn.Module]) -> bool:
    first, *others = map(_form, layers)
    return all(other == first for other in others)


def _form(layer: nn.Module) -> list[Any]:
    """All that a layer's computation can depend on, but for its number and its weights."""
    return [
        (
            name,
            type(module),
            {k: v for k, v in vars(module).items() if isinstance(v, _SIMPLE) and k not in _OTHER},
            [(key, p.shape, p.dtype, p.requires_grad) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in layer.named_modules()
    ]


@dataclass(frozen=True)
class _Place:
    """Of a stretch of moments in the whole model's run: how much later, and of layers with how much higher numbers."""

    later: int
    layers: int


class _Time:
    """Moments of the short run, and where they are in the whole model's.

    One layer of the forward pass is repeated for those that the short model lacks, and as many moments of the backward
    pass, from one layer's first gradient to the next one's.
    """

    def __init__(self, run: DryRun, whole: CausalLM) -> None:
        layers = _layers(whole)
        prefix = layers[0][0].rsplit(".", 1)[0]
        self.more = len(layers) - LAYERS
        """Layers that the short model lacks."""
        names = [parameter.name for parameter in run.parameters]
        numbers = [[n for n, x in enumerate(names) if x.startswith(f"{prefix}.{i}.")] for i in range(LAYERS)]
        self.first, self.each = next(iter(numbers[0]), 0), len(numbers[0])
        """Number of the layers' first parameter, and how many a layer has."""
        turn = next(moment for name, moment in run.storages.phases if name == c.BACKWARD)
        scopes = [scope for scope in run.storages.scopes if scope.opened < turn and scope.name.startswith(f"{prefix}.")]
        self.forward = [scope.opened for scope in scopes]
        arrived = dict(run.arrivals)
        first = [min((arrived[n] for n in each if n in arrived), default=None) for each in reversed(numbers)]
        self.backward = [moment for moment in first if moment is not None]
        """Of the last layer first, as they come."""
        flat = [number for each in numbers for number in each]
        self.regular = (
            flat == list(range(self.first, self.first + LAYERS * self.each))
            and [scope.name for scope in scopes] == [f"{prefix}.{i}" for i in range(LAYERS)]
            and len(self.backward) == LAYERS
            and all(len({at[i + 1] - at[i] for i in (2, 3, 4)}) == 1 for at in (self.forward, self.backward))
        )
        """Whether the layers are passed one after the other, the middle ones in as many moments each."""
        if self.regular:
            self.period = self.forward[3] - self.forward[2], self.backward[3] - self.backward[2]
            self._borders = [*self.forward[_MIDDLE : _MIDDLE + 2], *self.backward[_MIDDLE : _MIDDLE + 2]]
            self.ahead, behind = (self.more * period for period in self.period)
            copies = range(self.more + 1)
            self._places = [
                [_Place(0, 0)],
                [_Place(copy * self.period[0], copy) for copy in copies],
                [_Place(self.ahead, self.more)],
                [_Place(self.ahead + copy * self.period[1], self.more - copy) for copy in copies],
                [_Place(self.ahead + behind, 0)],
            ]

    def zone(self, moment: int) -> int:
        """0: before the layer that is repeated. 1: it. 2: until the backward pass repeats. 3: there. 4: after it."""
        return bisect.bisect_right(self._borders, moment)

    def places(self, moment: int) -> list[_Place]:
        """Of a moment, one or as many as layers are repeated."""
        return self._places[self.zone(moment)]

    def end(self, begin: int, end: int | None, place: _Place) -> int | None:
        """When what begins at `begin`, in a place of it, ends, which in the short run is `end`."""
        if end is None:
            return None
        zone, last = self.zone(begin), self.zone(end)
        if zone in (1, 3) or (zone == 2 and last == 3):
            if zone == 1 and last > 1 and end > self.forward[-1]:  # in the layer's own part of the backward pass
                return end + self.ahead + (self.more - place.layers) * self.period[1]
            return end + place.later
        # What was there before a layer, or ends with it, is not of its copies.
        return end if zone == 0 and end <= self._borders[1] else end + self.places(end)[-1].later

    def number(self, number: int, place: _Place) -> int:
        """Of a parameter in the whole model; those after the layers come after all of them."""
        if number < self.first:
            return number
        return number + self.each * (place.layers if number < self.first + self.each * LAYERS else self.more)


def stretched(short: DryRun, whole: CausalLM) -> DryRun | None:
    """The dry run of `whole`, from that of its first LAYERS layers; None where these do not repeat."""
    time = _Time(short, whole)
    if not time.regular or not _repeats(short, time):
        return None
    names = [name for name, _ in whole.named_parameters()]

    def lifetime(x: Lifetime, at: _Place) -> Lifetime:
        number = None if x.parameter is None else time.number(x.parameter, at)
        return replace(
            x,
            allocated_at=x.allocated_at + at.later,
            freed_at=time.end(x.allocated_at, x.freed_at, at),
            what=x.what if number is None else f"gradient of {names[number]}",
            scope=None,
            parameter=number,
        )

    def call(x: Call, at: _Place) -> Call:
        numbers = tuple(time.number(number, at) for number in x.parameters)
        return Call(x.opened + at.later, time.end(x.opened, x.closed, at), numbers)

    storages = short.storages
    lifetimes = [lifetime(x, at) for x in storages.lifetimes for at in time.places(x.allocated_at)]
    calls = [call(x, at) for x in short.calls for at in time.places(x.opened)]
    arrivals = [(time.number(n, at), moment + at.later) for n, moment in short.arrivals for at in time.places(moment)]
    return replace(
        short,
        model=whole,
        storages=StorageTrace(
            lifetimes=sorted(lifetimes, key=lambda x: x.allocated_at),
            phases=[(name, moment + time.places(moment)[-1].later) for name, moment in storages.phases],
            now=storages.now + time.places(storages.now)[-1].later,
        ),
        parameters=[Parameter(name, tuple(p.shape)) for name, p in whole.named_parameters()],
        arrivals=sorted(arrivals, key=lambda arrival: arrival[1]),
        calls=sorted(calls, key=lambda x: x.opened),
        # The input of every block.
        offloaded=short.offloaded // LAYERS * (LAYERS + time.more),
    )


def _repeats(short: DryRun, time: _Time) -> bool:
    """Whether what is made, called and handed over in a middle layer is that of the next, so many moments later."""
    ahead, behind = time.period
    turn = time.forward[-1]

    def unit(start: int, until: int, period: int, later: int, layers: int) -> list[Any] | None:
        """What begins in `period` moments from `start`, as it would be `later` moments and `layers` layers before."""
        found: list[Any] = []
        for x in short.storages.lifetimes:
            if start <= x.allocated_at < start + period:
                kept = x.allocated_at < turn and x.freed_at is not None and x.freed_at > turn
                if x.freed_at is None or (x.freed_at > until and not kept):
                    return None
                # What the forward pass keeps is let go the earlier, the later its layer.
                end = x.freed_at + layers * behind if kept else x.freed_at - later
                number = None if x.parameter is None else x.parameter - layers * time.each
                found.append((x.allocated_at - later, end, x.bytes, x.phase, x.category, number))
        for call in short.calls:
            if start <= call.opened < start + period:
                closed = None if call.closed is None else call.closed - later
                found.append((call.opened - later, closed, [n - layers * time.each for n in call.parameters]))
        return found + [
            (number - layers * time.each, moment - later)
            for number, moment in short.arrivals
            if start <= moment < start + period
        ]

    def repeats(at: list[int], period: int, layers: int) -> bool:
        """Whether the first of three begins is followed by what the second is."""
        one = unit(at[0], at[2], period, 0, 0)
        return one is not None and one == unit(at[1], at[2] + period, period, period, layers)

    return (
        repeats(time.forward[_MIDDLE:], ahead, 1)
        and repeats(time.backward[_MIDDLE:], behind, -1)
        and repeats(time.backward[_MIDDLE - 1 :], behind, -1)
    )
