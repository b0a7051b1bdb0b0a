"""Second moments kept by rows and columns: two vectors stand for a matrix (Adafactor, Shazeer and Stern 2018).

::

    v = r c / mean(r),      r: means of v over each row, c: over each column

A step works on v itself, fp32, of a stretch of a parameter at a time: its buffer is filled before the kernel runs, and
the rows and columns of what the rule has made of it are added up afterwards, for which no second pass is needed. A mean
is linear: of a second moment that follows v <- b v + (1 - b) g^2, r and c are those of g^2, averaged likewise. The step
itself has the latest g^2 by element, and only what is older by rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import blocks_of

STRETCH = {"cpu": 2**20}
"""By kind of device, elements at a time: a buffer of 4 MB. Shorter ones cost a CPU more in calls than they save."""

STRETCH_ELSEWHERE = 2**22
"""On a GPU each stretch is a few launches, and 16 MB stay in the cache of a large one."""

LARGEST = 2.0**126
"""Of v: the square of the largest gradient that counts. A sum of finite numbers may be larger than any."""

_ALIGNED = 64
"""Elements: compiled kernels count on addresses that are multiples of 16 bytes, and CPUs like whole cache lines."""


class Sums(Protocol):
    """The part of `toolkit.optim.statistics.Ranks` that is needed here."""

    def add(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Stretch:
    """v of `size` elements of a parameter: `blocks`, [blocks, BLOCK], in a buffer of whole rows from `row` on,
    `before` elements behind its start."""

    blocks: Tensor
    grid: Tensor
    row: int
    before: int
    size: int


@dataclass
class Factors:
    """A parameter's second moment. `rows` and `columns`, fp32, are updated in place by `settle`.

    `sums`: what this rank has found of the new one so far: by row, by column, and of how many elements.
    """

    rows: Tensor
    columns: Tensor
    share: Tensor = field(init=False)
    bounded: Tensor = field(init=False)  # columns, so that no product is larger than LARGEST
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.share = shares(self.rows)
        largest = self.share.max() if self.share.numel() else 1.0
        self.bounded = self.columns.clamp(max=LARGEST / largest)
        self.sums = self.rows.new_zeros(self.rows.numel() + self.columns.numel() + 1)

    def whole(self, start: int, size: int) -> Stretch:
        """v of the elements from `start` on, to be changed by a step."""
        columns = self.columns.numel()
        row, before = divmod(start, columns)
        rows = -(-(before + size) // columns)
        lead = -before % _ALIGNED
        end = max(rows * columns, before + blocks_of(size) * BLOCK)
        buffer = self.rows.new_empty(lead + end)[lead:]
        buffer[before + size :] = 0.0
        grid = buffer[: rows * columns].view(rows, columns)
        torch.mul(self.share[row : row + rows, None], self.bounded, out=grid)
        return Stretch(buffer[before : before + blocks_of(size) * BLOCK].view(-1, BLOCK), grid, row, before, size)

    def add(self, made: Stretch) -> None:
        """Take what a step has made of it."""
        flat, end = made.grid.view(-1), made.before + made.size
        flat[: made.before] = 0.0
        flat[end:] = 0.0
        rows = self.rows.numel()
        self.sums[made.row : made.row + made.grid.shape[0]] += made.grid.sum(1)
        self.sums[rows:-1] += made.grid.sum(0)
        self.sums[-1] += made.size


def shares(rows: Tensor) -> Tensor:
    """What the columns of a matrix are multiplied with to give its rows: r / mean(r)."""
    mean = rows.mean()
    return torch.where(mean > 0.0, rows / mean, 0.0)


def settle(factors: Sequence[Factors], ranks: Sums) -> None:
    """The new rows and columns, from the sums of all ranks; of a parameter that none has updated they stay."""
    by_device: dict[torch.device, list[Factors]] = {}  # of a plain loop parameters may lie on several
    for one in factors:
        by_device.setdefault(one.sums.device, []).append(one)
    for here in by_device.values():
        total = ranks.add(torch.cat([one.sums for one in here]))
        for one, sums in zip(here, total.split([one.sums.numel() for one in here]), strict=True):
            rows, columns = one.rows.numel(), one.columns.numel()
            updated = sums[-1] > 0.0
            for kept, mean in ((one.rows, sums[:rows] / columns), (one.columns, sums[rows:-1] / rows)):
                kept.copy_(torch.where(updated, mean.clamp(max=LARGEST), kept))
