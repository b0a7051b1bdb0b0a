"""Steps of a plain loop's tensors, one after the other; small neighbours are joined and stepped in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.optim.streaming import TensorStep
from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import blocks_of

SMALL = {"cpu": 2**14}
"""By kind of device, elements up to which a tensor is copied to be stepped with others: a call of its own takes as long
as the copies of twice as many."""

SMALL_ELSEWHERE = 2**16
"""On a GPU a call is a launch, and copies are fast."""

AT_ONCE = 2**20
"""Elements after which a call is made: the copies, of weights, gradients and state, take some 10 MB."""


@dataclass
class Joined:
    """Takes the steps of one training step in the order of a parameter group's blocks.

    `finish` must follow; until then nobody may write to weights or gradients.
    """

    _scales: dict[torch.device, Tensor] = field(default_factory=dict)
    _waiting: list[tuple[TensorStep, Tensor, Tensor]] = field(default_factory=list)
    _first: int = 0
    _blocks: int = 0
    _memory: set[int] = field(default_factory=set)

    def add(self, step: TensorStep, parameter: Tensor, gradient: Tensor, first_block: int) -> None:
        """`gradient` is flat; `first_block` is the number of the parameter's first block in its group."""
        size = gradient.numel()
        memory = parameter.untyped_storage().data_ptr()
        small = size <= SMALL.get(gradient.device.type, SMALL_ELSEWHERE)
        if self._waiting and not (small and memory not in self._memory and self._follows(step, gradient, first_block)):
            self.finish()  # what may overlap is stepped one after the other: of copies the last one would win
        if not self._waiting:
            self._first, self._blocks = first_block, 0
        self._waiting.append((step, parameter, gradient))
        self._memory.add(memory)
        self._blocks += blocks_of(size)
        if not small or self._blocks * BLOCK >= AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Step what is waiting."""
        waiting, self._waiting = self._waiting, []
        self._memory.clear()
        if len(waiting) == 1:
            [(step, _, gradient)] = waiting
            stream, scale = step.stream(first_block=self._first), self._scale(gradient.device)
            stream.add(gradient, scale)
            stream.finish(scale)
        elif waiting:
            self._step([step for step, _, _ in waiting], [gradient for _, _, gradient in waiting])
        for step, parameter, _ in waiting:
            step.write_back(parameter)

    def _follows(self, step: TensorStep, gradient: Tensor, first_block: int) -> bool:
        """Whether one call can step this with those that are waiting."""
        last, _, before = self._waiting[-1]
        return (
            first_block == self._first + self._blocks
            and step.function is last.function
            and step.scalars is last.scalars  # of the same group, step and device
            and step.theta.dtype == last.theta.dtype
            and gradient.dtype == before.dtype
        )

    def _step(self, steps: list[TensorStep], gradients: list[Tensor]) -> None:
        sizes = [gradient.numel() for gradient in gradients]
        blocks = [blocks_of(size) for size in sizes]
        weights, first = [step.theta for step in steps], steps[0]
        theta, g = _joined(weights, sizes), _joined(gradients, sizes)
        parts = [torch.cat(each) for each in zip(*(step.parts for step in steps), strict=True)]
        rounding = (first.seed, first.step, self._first)
        scale = self._scale(g.device)
        first.function(first.compiled, theta.view(-1, BLOCK), g.view(-1, BLOCK), first.scalars, scale, parts, rounding)
        pieces = theta.split([held * BLOCK for held in blocks])
        written = [x[:n] if n % BLOCK else x for x, n in zip(pieces, sizes, strict=True)]
        torch._foreach_copy_(weights, written)
        if parts:  # a rule may keep nothing
            stored = zip(*(part.split(blocks) for part in parts), strict=True)  # by tensor, as in `steps`
            torch._foreach_copy_([x for step in steps for x in step.parts], [x for each in stored for x in each])

    def _scale(self, device: torch.device) -> Tensor:
        if device not in self._scales:
            self._scales[device] = torch.ones((), device=device)
        return self._scales[device]


def _joined(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """One tensor of them all, zeros after each up to the end of its last block."""
    zeros = tensors[0].new_zeros(BLOCK)
    pieces = []
    for tensor, size in zip(tensors, sizes, strict=True):
        pieces.append(tensor)
        if size % BLOCK:
            pieces.append(zeros[: -size % BLOCK])
    return torch.cat(pieces)
