"""Whole matrices in a step: what ranks hold of each goes to one owner, is transformed there, and comes back.

Owners are chosen so that all have about as much to do. Matrices go in rounds, in each of which an owner gets no more
than the largest of them all. Everything goes as fp32, twice: to the owner and back.

Among several ranks rounds overlap: while the matrices of one are transformed, those of the next are on their way to
their owners, and those of the one before on their way back. Beside weights, state and gradients a rank holds the
matrices that it transforms, and what it sends and receives in the two other rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.means import find_means
from toolkit.optim.rule import Matrix, Rule
from toolkit.optim.statistics import Member, Ranks, run
from toolkit.state.sharding import matrices_of

Round = list[tuple[int, int]]
"""(number of the member, its owner), by owner."""


class Phase(Enum):
    """What a round goes through, one after the other."""

    SEND = "directions are computed, and on their way to the owners"
    TRANSFORM = "they have arrived, and are transformed"
    RETURN = "what they became is on its way back"
    UPDATE = "it has arrived; means of it are found, and weights and state updated"


def rounds(sizes: Sequence[int], ranks: int) -> list[Round]:
    """Which matrix is transformed on which rank, and when: the largest first, each on the rank that has least."""
    loads, queues = [0] * ranks, [[] for _ in range(ranks)]  # type: tuple[list[int], list[list[int]]]
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        owner = loads.index(min(loads))
        loads[owner] += sizes[number]
        queues[owner].append(number)
    most, found = max(sizes, default=0), []
    while any(queues):
        now: Round = []
        for owner, queue in enumerate(queues):
            taken = 0
            while queue and taken + sizes[queue[0]] <= most:
                taken += sizes[queue[0]]
                now.append((queue.pop(0), owner))
        found.append(now)
    return found


def order(count: int, ranks: int) -> Iterator[tuple[int, Phase]]:
    """What comes after what in `count` rounds, on every rank the same: (number of the round, its phase).

    A round's matrices travel while others are transformed. They return only once the round before is over, since what
    that one sums over ranks would wait behind them.
    """
    if ranks == 1:  # nothing travels
        yield from ((number, phase) for number in range(count) for phase in Phase)
        return
    for newest in range(count + 2):
        turns = (
            (newest, Phase.SEND),
            (newest - 1, Phase.TRANSFORM),
            (newest - 2, Phase.UPDATE),
            (newest - 1, Phase.RETURN),
        )
        yield from ((number, phase) for number, phase in turns if 0 <= number < count)


def step_matrices(members: Sequence[Member], scale: Tensor, ranks: Ranks) -> None:
    """The end of a step: transform each parameter's direction as a whole, measure that, and update with it."""
    plan = rounds([member.parameter.numel for member in members], ranks.size)
    running = [_round([(members[number], owner) for number, owner in now], scale, ranks) for now in plan]
    for number, _ in order(len(plan), ranks.size):
        next(running[number], None)


def _round(now: Sequence[tuple[Member, int]], scale: Tensor, ranks: Ranks) -> Iterator[None]:
    """One round; stops after each phase but the last."""
    rule = now[0][0].step.function.rule
    matrix = rule.matrix()
    assert matrix is not None
    members, mine = [member for member, _ in now], [member for member, owner in now if owner == ranks.number]
    given = [sum(_held(member, ranks.number) for member, owner in now if owner == rank) for rank in range(ranks.size)]
    owned = [sum(_held(member, rank) for member in mine) for rank in range(ranks.size)]
    arrival = ranks.swap(_directions(members, matrix.by, scale, sum(given)), given, owned)
    yield
    received = arrival()
    del arrival  # and with it what was sent
    at = [0, *accumulate(owned)]
    for member in mine:
        places = []
        for part in member.fragments:
            places.append(slice(at[part.rank], at[part.rank] + part.numel))
            at[part.rank] += part.numel
        if places:
            _transform(rule, matrix, member, received, places)
    yield
    arrival = ranks.swap(received, owned, given)
    del received
    yield
    returned = arrival()
    del arrival
    sizes = [_held(member, ranks.number) for member in members]
    for member, values in zip(members, returned.split(sizes), strict=True):
        member.wide[matrix.name] = ("elements", values)
    del returned, values
    find_means(members, rule.order()[1], scale, ranks)
    for member in members:
        member.update(scale)
        member.wide.clear()


def _directions(members: Sequence[Member], function: str, scale: Tensor, size: int) -> Tensor:
    """What this rank holds of the members' directions, one after the other."""
    joined = torch.empty(size, dtype=torch.float32, device=members[0].step.theta.device)
    at = 0
    for member in members:
        for _, [found] in run(member, function, scale):
            joined[at : at + found.numel()] = found
            at += found.numel()
    assert at == size, "of each parameter that this rank holds a part of, the gradient is there"
    return joined


def _transform(rule: type[Rule], matrix: Matrix, member: Member, received: Tensor, places: Sequence[slice]) -> None:
    """Transform a parameter whose elements are at these places of `received`, where the result takes their place."""
    together = all(one.stop == other.start for one, other in pairwise(places))
    if together:
        whole = received[places[0].start : places[-1].stop]
    else:
        whole = torch.cat([received[place] for place in places])
    for one in whole.view(matrices_of(member.parameter.shape)):
        one.view(-1).copy_(_transformed(rule, matrix, one))
    if not together:
        for place, values in zip(places, whole.split([place.stop - place.start for place in places]), strict=True):
            received[place] = values


def _transformed(rule: type[Rule], matrix: Matrix, one: Tensor) -> Tensor:
    """What the rule makes of a matrix, flat and fp32."""
    made: Tensor = getattr(rule, matrix.transform)(one)
    if made.shape != one.shape:  # of a transposed one the elements would go to other places
        raise UserError(
            f"{rule.__name__}.{matrix.transform} returns {list(made.shape)} for a matrix of {list(one.shape)}, and "
            "must return one of its shape"
        )
    # What is a view of the matrix, its transpose for one, is copied here, before the matrix is overwritten.
    return made.float().reshape(-1)


def _held(member: Member, rank: int) -> int:
    return sum(part.numel for part in member.fragments if part.rank == rank)
