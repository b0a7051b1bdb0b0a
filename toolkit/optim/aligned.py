"""1-D parameters of rules that look at more than one element: each begins at a block of its own in a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.optim.statistics import Member, Share, flats
from toolkit.optim.streaming import TensorStep
from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import blocks_of


def aligned(members: Sequence[Member]) -> tuple[list[Member], list[Moved]]:
    """`members`, each of which begins at a block of its tensor, and what has been moved for that.

    1-D parameters lie in one tensor without regard to blocks. They are few, and their state is kept exactly, one
    number for each lane: a copy of that tensor has them apart.
    """
    found: list[Member] = []
    moved = []
    for flat in flats(members):
        if any(member.share is not None and member.share.fragment.offset % BLOCK for member in flat.members):
            moved.append(Moved.of(flat.members))
            found += moved[-1].members
        else:
            found += flat.members
    return found, moved


@dataclass
class Moved:
    """Members of a tensor in a copy of it. `source`, `target`: where their elements lie in either."""

    original: TensorStep
    members: list[Member]
    source: Tensor
    target: Tensor

    @classmethod
    def of(cls, members: Sequence[Member]) -> Moved:
        """Copy."""
        step = members[0].step
        assert all(part.shape[1] == BLOCK for part in step.parts), "a block belongs to one parameter"
        device, at, shares, source, target = step.theta.device, 0, list[Share | None](), [], []
        for member in members:
            share = member.share
            if share is not None:
                part = share.fragment
                source.append(torch.arange(part.offset, part.offset + part.numel))
                target.append(torch.arange(at, at + part.numel))
                gradient, share.gradient = share.gradient, share.gradient.new_empty(0)
                share = Share(replace(part, offset=at), gradient, at // BLOCK)
                at += blocks_of(part.numel) * BLOCK
            shares.append(share)
        places = [torch.cat(each).to(device) for each in (source, target)]
        made = cls(step, [], *places)
        theta = step.theta.new_zeros(at)
        parts = [part.new_zeros(at // BLOCK, BLOCK) for part in step.parts]
        for new, old in zip((theta, *parts), (step.theta, *step.parts), strict=True):
            new.view(-1)[made.target] = old.view(-1)[made.source]
        copied = replace(step, theta=theta, parts=parts)
        made.members = [
            replace(member, step=copied, share=share) for member, share in zip(members, shares, strict=True)
        ]
        return made

    def write_back(self) -> None:
        """Put what was copied where it belongs."""
        copied = self.members[0].step
        for new, old in zip((copied.theta, *copied.parts), (self.original.theta, *self.original.parts), strict=True):
            old.view(-1)[self.source] = new.view(-1)[self.target]
