"""Whole matrices in a step: what ranks hold of each goes to one owner, is transformed there, and comes back.

Owners are chosen so that all have about as much to do. Matrices go in rounds, in each of which an owner gets no more
than the largest of them all: beside weights, state and gradients a rank holds what it sends and what it owns in a
round. Everything goes as fp32, twice: to the owner and back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.means import find_means
from toolkit.optim.rule import Rule
from toolkit.optim.statistics import Member, Ranks, run

Round = list[tuple[int, int]]
"""(number of the member, its owner)."""


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


def step_matrices(members: Sequence[Member], scale: Tensor, ranks: Ranks) -> None:
    """The end of a step: transform each parameter's direction as a whole, measure that, and update with it."""
    rule = members[0].step.function.rule
    _, after = rule.order()
    for now in rounds([member.parameter.numel for member in members], ranks.size):
        _transform(rule, [(members[number], owner) for number, owner in now], scale, ranks)
        find_means([members[number] for number, _ in now], after, scale, ranks)
        for number, _ in now:
            _update(members[number], scale)


def _transform(rule: type[Rule], now: Sequence[tuple[Member, int]], scale: Tensor, ranks: Ranks) -> None:
    matrix = rule.matrix()
    assert matrix is not None
    device = now[0][0].step.theta.device
    sent: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    for member, owner in now:
        sent[owner] += [found[0].to(device) for _, found in run(member, matrix.by, scale)]
    mine = [member for member, owner in now if owner == ranks.number]
    sizes = [sum(_held(member, rank) for member in mine) for rank in range(ranks.size)]
    received = ranks.swap([_joined(parts, device) for parts in sent], sizes)
    del sent

    back: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    at = [0] * ranks.size
    for member in mine:
        whole = torch.empty(member.parameter.numel, dtype=torch.float32, device=device)
        for part in member.fragments:
            whole[part.start : part.stop] = received[part.rank][at[part.rank] :][: part.numel]
            at[part.rank] += part.numel
        shape = (member.parameter.rows, member.parameter.columns)
        made = getattr(rule, matrix.transform)(whole.view(shape))
        if made.shape != shape:  # of a transposed one the elements would go to other places
            raise UserError(
                f"{rule.__name__}.{matrix.transform} returns {list(made.shape)} for a matrix of {list(shape)}, and "
                "must return one of its shape"
            )
        made = made.float().reshape(-1)
        for part in member.fragments:
            back[part.rank].append(made[part.start : part.stop])
    del received
    own = [sum(_held(member, ranks.number) for member, owner in now if owner == rank) for rank in range(ranks.size)]
    returned = ranks.swap([_joined(parts, device) for parts in back], own)
    at = [0] * ranks.size
    for member, owner in now:
        size = _held(member, ranks.number)
        values = returned[owner][at[owner] : at[owner] + size].to(member.step.theta.device)
        member.wide[matrix.name] = ("elements", values)
        at[owner] += size


def _update(member: Member, scale: Tensor) -> None:
    member.update(scale)
    member.wide.clear()


def _held(member: Member, rank: int) -> int:
    return sum(part.numel for part in member.fragments if part.rank == rank)


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.float32, device=device)
