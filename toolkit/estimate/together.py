"""What a step holds of whole parameters: sums and buffers of means, and matrices at their owners.

Goes through `toolkit.optim.together` with sizes only: for each pass and each phase of a round of matrices the most that
is held, in the order of means.py, statistics.py and matrices.py there. What a rule does with a matrix runs on the meta
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from toolkit.errors import UserError
from toolkit.estimate.dry_run import transients
from toolkit.optim import Rule
from toolkit.optim.factored import STRETCH, STRETCH_ELSEWHERE
from toolkit.optim.kernel import measured_by_element
from toolkit.optim.matrices import Phase, Round, order, rounds
from toolkit.optim.rule import Matrix
from toolkit.optim.statistics import CHUNK, stretches
from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import Fragment, blocks_of, lines, matrices_of

_FP32, _FP64, _INT64 = 4, 8, 8


@dataclass(frozen=True)
class Part:
    """A parameter, by number, and what this rank steps of it; None if it steps none of it."""

    number: int
    shape: tuple[int, ...]
    numel: int
    fragment: Fragment | None

    @property
    def held(self) -> int:
        return self.fragment.numel if self.fragment is not None else 0


@dataclass(frozen=True)
class Flat:
    """Parameters of one rule in one flat tensor, with `width` bytes of weights and state for each element.

    `factored`: how many of its states are kept by rows and columns.
    """

    rule: type[Rule]
    parts: tuple[Part, ...]
    width: float
    factored: int = 0

    @property
    def blocks(self) -> int:
        return sum(blocks_of(part.held) for part in self.parts)

    @property
    def copied(self) -> float:
        """Bytes of the copy in which 1-D parameters begin at blocks, and of where everything comes from and goes."""
        fragments = [part.fragment for part in self.parts if part.fragment is not None]
        if not any(fragment.offset % BLOCK for fragment in fragments):
            return 0.0
        return self.width * self.blocks * BLOCK + 2 * _INT64 * sum(fragment.numel for fragment in fragments)

    @property
    def sums(self) -> int:
        """Bytes of what a step finds of factored states: by row, by column, and of how many elements."""
        return self.shares + self.factored * _FP32 * len(self.parts)

    @property
    def shares(self) -> int:
        """Bytes of what the products of factored states are made of."""
        return self.factored * _FP32 * sum(lines(part.shape, of) for part in self.parts for of in ("rows", "columns"))


@dataclass(frozen=True)
class Moment:
    """The most that a pass or a phase of a round holds. `used`: parameters whose gradients it is the last to need.

    `exchanged`: bytes of it that go over the wire or come from there.
    """

    what: str
    bytes: float
    used: tuple[int, ...] = ()
    exchanged: int = 0


@dataclass(frozen=True)
class Together:
    """The moments of a step in order.

    `sent`: bytes that this rank sends in it for whole matrices. `counts`: bytes of what the host keeps from step to
    step: how many elements each sum is of.
    """

    moments: tuple[Moment, ...]
    sent: int
    counts: int


def step_together(flats: Sequence[Flat], *, ranks: int, rank: int, device: str) -> Together:
    """The part of a step that looks at whole parameters.

    Args:
        flats: all flat tensors whose rule has statistics, in the order of the optimizer's groups.
        ranks, rank: how many hold parts of the same parameters, and which one this is.
        device: whose kernels run what a rule does with a matrix.
    """
    by_rule: dict[type[Rule], list[Flat]] = {}
    for flat in flats:
        by_rule.setdefault(flat.rule, []).append(flat)
    moments: list[Moment] = []
    sent = counts = 0
    sums = sum(flat.sums for flat in flats)
    factors = sums + sum(flat.shares for flat in flats)
    for rule, own in by_rule.items():
        parts = [part for flat in own for part in flat.parts]
        kept = factors + sum(flat.copied for flat in own)
        counted = {mean.over: mean for means in rule.passes().values() for mean in means}
        counts += _FP64 * sum(
            mean.sums(part.shape)
            for over, mean in counted.items()
            if over not in ("component", "model")
            for part in parts
        )
        for function in rule.order()[0]:
            most, found = _measured(own, function, device)
            moments.append(Moment("means over parameters, rows or columns", kept + most))
            kept += found
        matrix = rule.matrix()
        if matrix is None:
            most = _pass(own, "update", (), device)
            moments.append(Moment("means by element", kept + most, tuple(part.number for part in parts)))
            continue
        plan = rounds([part.numel for part in parts], ranks)
        moments += _exchanges(rule, matrix, parts, plan, kept, ranks, rank, device, max(flat.factored for flat in own))
        owned = [(parts[number], owner == rank) for now in plan for number, owner in now]
        sent += _FP32 * sum(part.numel - part.held if mine else part.held for part, mine in owned)
    if factors:
        moments.append(Moment("rows and columns of second moments", factors + sums))
    return Together(tuple(moments), sent, counts)


# ---- passes over what this rank holds -----------------------------------------------------------------------------


def _measured(flats: Sequence[Flat], function: str, device: str) -> tuple[int, int]:
    """Bytes of a measuring pass: the most that it holds, and of the means that stay."""
    means = flats[0].rule.passes()[function]
    lengths = [sum(mean.sums(part.shape) for flat in flats for part in flat.parts) for mean in means]
    sums, found = _FP64 * sum(lengths), _FP32 * sum(lengths)
    after = found + _FP64 * max(lengths) * (2 if device == "cuda" else 1)  # a mean, and the counts of its sums
    return sums + max(_pass(flats, function, measured_by_element(flats[0].rule, function), device), after), found


def _pass(flats: Sequence[Flat], function: str, wide: Sequence[bool], device: str) -> int:
    """Bytes beside its sums of a pass of one of the rule's functions; `wide`: which results are by element."""
    rule = flats[0].rule
    numbers, spread = rule.given(function)
    narrow = len(numbers) + (wide.count(False) + 1 if not all(wide) else 0)  # results, and how many lanes count
    factored = max((flat.factored * opened(part, device) for flat in flats for part in flat.parts), default=0)
    if not any(wide) and not spread and not factored:
        # One number for each block; places, or sums in fp64, beside them.
        return max(flat.blocks for flat in flats) * (_FP32 * narrow + _INT64 if narrow else 0)
    matrix = rule.matrix()
    across = any(matrix is None or name != matrix.name for name in spread)
    parts = [part for flat in flats for part in flat.parts]
    added = function in rule.passes()
    return factored + _by_element(
        parts, results=sum(wide), narrow=narrow, spread=len(spread), across=across, added=added
    )


def opened(part: Part, device: str) -> int:
    """Bytes of the buffer that holds a factored state of the longest stretch: whole rows, and where they are cut."""
    most, columns = 0, lines(part.shape, "columns")
    start = part.fragment.start if part.fragment is not None else 0
    for at, size in stretches(part.held, STRETCH.get(device, STRETCH_ELSEWHERE)):
        before = (start + at) % columns
        most = max(most, -(-(before + size) // columns) * columns, before + blocks_of(size) * BLOCK)
    return _FP32 * most


def _by_element(parts: Sequence[Part], *, results: int, narrow: int, spread: int, across: bool, added: bool) -> int:
    """Bytes of the buffers in which elements go through CHUNK at a time: of one stretch and what is left of the last.

    `results` and `spread`: how many come out and go in with a value for each element; `across`: whether some of
    these are of rows or columns, which are laid out in whole rows first. `added`: results are added up, for which they
    are laid out so, too.
    """
    most = before = 0
    for part in parts:
        if part.fragment is None:
            continue
        columns, same = lines(part.shape, "columns"), 0
        for at, size in stretches(part.held, CHUNK):
            start, blocks = part.fragment.start + at, blocks_of(size)
            now = blocks * BLOCK
            rows = -(-(start % columns + size) // columns) * columns
            made = results * (before + now) + spread * (same + now) + (rows if across else 0)
            uneven = added and results and (start % columns or size % columns)
            kept = (results + spread) * now + (rows if uneven else 0)
            most = max(most, _FP32 * (max(made, kept) + narrow * blocks))
            before = same = now
    return most


# ---- whole matrices -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Round:
    """A round as one rank has part in it: all its matrices, and those that the rank owns."""

    members: tuple[Part, ...]
    mine: tuple[Part, ...]
    alone: bool
    factored: int

    @property
    def given(self) -> int:
        """Bytes of what the rank holds of the matrices; it sends as much, and as much comes back."""
        return _FP32 * sum(part.held for part in self.members)

    @property
    def owned(self) -> int:
        """Bytes of the matrices that it owns; alone, a rank transforms them where their directions are."""
        return 0 if self.alone else _FP32 * sum(part.numel for part in self.mine)

    def after(self, phase: Phase) -> int:
        """Bytes held between this phase of the round and the next one."""
        if phase is Phase.TRANSFORM:
            return self.given if self.alone else self.owned
        return 0 if phase is Phase.UPDATE else self.given + self.owned

    def during(self, phase: Phase, rule: type[Rule], matrix: Matrix, device: str) -> int:
        """The most bytes held meanwhile."""
        here, means = [Flat(rule, self.members, 0.0, self.factored)], 0
        if phase is Phase.SEND:
            return max(self.given + _pass(here, matrix.by, (True,), device), self.after(phase))
        if phase is Phase.RETURN:
            return self.given + self.owned
        if phase is Phase.TRANSFORM:
            # Several matrices come in pieces, those of the first rank first, and are put together.
            joined = _FP32 if len(self.mine) > 1 and not self.alone else 0
            made = [
                joined * one.numel + _transform(rule, matrix.transform, matrices_of(one.shape)[1:], device)
                for one in self.mine
            ]
            return self.after(phase) + max(made, default=0)
        held = [self.given + self.owned]
        for function in rule.order()[1]:
            most, found = _measured(here, function, device)
            held.append(self.given + means + most)
            means += found
        return max(*held, self.given + means + _pass(here, "update", (), device))


def _exchanges(
    rule: type[Rule],
    matrix: Matrix,
    parts: Sequence[Part],
    plan: Sequence[Round],
    kept: float,
    ranks: int,
    rank: int,
    device: str,
    factored: int,
) -> list[Moment]:
    """All rounds: directions on their way to owners, transformed matrices on their way back, their means, the update.

    While a round has its turn, those before and after it hold what is on its way.
    """
    every = [
        _Round(
            tuple(parts[number] for number, _ in now),
            tuple(parts[number] for number, owner in now if owner == rank),
            ranks == 1,
            factored,
        )
        for now in plan
    ]
    waiting: dict[int, int] = {}
    moments = []
    for number, phase in order(len(every), ranks):
        own, _ = every[number], waiting.pop(number, 0)
        others = sum(waiting.values())
        used = tuple(one.number for one in own.members) if phase is Phase.UPDATE else ()
        wire = others + own.given + own.owned if ranks > 1 else 0
        moments.append(Moment("whole matrices", kept + others + own.during(phase, rule, matrix, device), used, wire))
        waiting[number] = own.after(phase)
    return moments


@lru_cache(maxsize=256)
def _transform(rule: type[Rule], name: str, shape: tuple[int, int], device: str) -> int:
    """Bytes beside a matrix while the rule transforms it, the result among them."""

    def transform(matrix: Tensor) -> Tensor:
        made: Tensor = getattr(rule, name)(matrix)
        return made.float().reshape(-1)

    try:
        return transients(transform, shape, device)
    except Exception as error:
        raise UserError(
            f"the memory of {rule.__name__} is not known: its {name} cannot be tried on the meta device: {error}"
        ) from None
