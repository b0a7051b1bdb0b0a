"""One optimizer step of one tensor, whose gradient comes in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from toolkit.errors import UserError
from toolkit.optim.kernel import StepFunction
from toolkit.state.codecs import BLOCK

STAGED = {"cpu": 2**16}
"""By kind of device, elements below which pieces are joined before they are used: norms are small and many."""

STAGED_ELSEWHERE = 2**24
"""On a GPU each use is a launch, which takes the host longer than the device takes for millions of elements. The copy
takes 32 MB in bf16."""

FEW = 16
"""Blocks that are copied as a whole where the last one ends early."""


def check_gradient(gradient: Tensor, name: str = "a parameter") -> None:
    """Raise UserError for a gradient that is not dense."""
    if gradient.layout != torch.strided:
        raise UserError(f"{name} has a sparse gradient, which is not supported; use dense embeddings (sparse=False)")


class StreamedStep:
    """Runs `function` over a tensor, as far as its gradient has been given.

    Args:
        function, compiled: the step and how to run it.
        theta: the weights, flat and contiguous; updated in place.
        parts: the state tensors, each [ceil(numel / BLOCK), per_block]; updated in place.
        scalars: fp32 [k], see `StepFunction`.
        rounding: seed, optimizer step and number of the tensor's first block.

    A block is updated as a whole. What ends in the middle of one goes through a padded copy of its last blocks.
    """

    def __init__(
        self,
        function: StepFunction,
        compiled: bool,
        theta: Tensor,
        parts: Sequence[Tensor],
        scalars: Tensor,
        rounding: tuple[int, int, int],
    ) -> None:
        self._function, self._compiled = function, compiled
        self._theta, self._parts, self._scalars, self._rounding = theta, list(parts), scalars, rounding
        self._staged = STAGED.get(theta.device.type, STAGED_ELSEWHERE)
        self._waiting: list[Tensor] = []
        self._size = 0
        self._start = 0
        self._dtype = theta.dtype

    def add(self, gradient: Tensor, scale: Tensor) -> None:
        """Take the gradient of the elements that follow those given so far, flat.

        Nobody may write to it before `finish`.
        """
        rest, size, self._dtype = gradient, gradient.numel(), gradient.dtype
        if size > self._staged:
            if self._size:  # a long piece is used where it lies, from the next block on
                head = -self._size % BLOCK
                self._stage(rest[:head], head)
                self._flush(scale, keep=False)
                rest, size = rest[head:], size - head
            if size > self._staged:
                whole = size // BLOCK * BLOCK
                self.apply(self._start, rest[:whole], scale)
                self._start += whole
                rest, size = rest[whole:], size - whole
        if size:
            own = rest.untyped_storage().nbytes() == size * rest.element_size()
            self._stage(rest if own else rest.clone(), size)  # a view would keep what has been used
            if self._size > self._staged:
                self._flush(scale, keep=True)

    def finish(self, scale: Tensor) -> None:
        """Update what is left; the gradient of what was never given is zero."""
        left = self._theta.numel() - self._start - self._size
        while left > 0:
            # Of the type that the others had: another would be another function to compile.
            zeros = self._theta.new_zeros(min(left, self._staged), dtype=self._dtype)
            self._stage(zeros, zeros.numel())
            self._flush(scale, keep=True)
            left -= zeros.numel()
        self._flush(scale, keep=False)

    def _stage(self, piece: Tensor, size: int) -> None:
        self._waiting.append(piece)
        self._size += size

    def _flush(self, scale: Tensor, *, keep: bool) -> None:
        """Use what is waiting; `keep`: but for an unfinished block."""
        if not self._size:
            return
        joined = torch.cat(self._waiting)
        used = self._size // BLOCK * BLOCK if keep else self._size
        self._waiting = [joined[used:].clone()] if used < self._size else []
        self._size -= used
        if used:
            self.apply(self._start, joined[:used], scale)
            self._start += used

    def apply(self, start: int, gradient: Tensor, scale: Tensor) -> None:
        """Update elements from `start`, a multiple of BLOCK, on; to the end of a block or of the tensor."""
        check_gradient(gradient)
        size, first = gradient.numel(), start // BLOCK
        assert start % BLOCK == 0 and (size % BLOCK == 0 or start + size == self._theta.numel())
        theta, parts = self._theta, self._parts
        blocks = -(-size // BLOCK)
        if size != theta.numel():
            theta = theta[start : start + size]
            parts = [part[first : first + blocks] for part in parts]
        # The compiled step takes two blocks or more; of a few, one call with a copy is faster than two.
        padded = 0 if size % BLOCK == 0 and blocks > 1 else blocks if blocks <= FEW else 2
        head = blocks - padded
        if not padded:
            view = (blocks, BLOCK)
            self._run(theta.view(view), gradient.view(view), scale, parts, first)
        elif head:
            view, cut = (head, BLOCK), slice(0, head * BLOCK)
            self._run(theta[cut].view(view), gradient[cut].view(view), scale, [part[:head] for part in parts], first)
        if padded:
            tail, rows = slice(head * BLOCK, None), max(padded, 2)
            theta_copy, gradient_copy = (pad(x[tail], (0, (head + rows) * BLOCK - size)) for x in (theta, gradient))
            own = [part[head:] for part in parts]
            # State is of whole blocks; of one alone the step takes a copy with another.
            used = own if padded == rows else [torch.cat([part, torch.zeros_like(part)]) for part in own]
            view = (rows, BLOCK)
            self._run(theta_copy.view(view), gradient_copy.view(view), scale, used, first + head)
            theta[tail] = theta_copy[: size - head * BLOCK]
            if used is not own:
                for copied, part in zip(used, own, strict=True):
                    part.copy_(copied[:padded])

    def _run(self, theta: Tensor, gradient: Tensor, scale: Tensor, parts: list[Tensor], block: int) -> None:
        seed, step, base = self._rounding
        self._function(self._compiled, theta, gradient, self._scalars, scale, parts, (seed, step, base + block))


@dataclass(frozen=True)
class TensorStep:
    """A step of one tensor that has been counted; `stream` takes its gradient. Fields as of `StreamedStep`.

    `factored`: the states that are no `parts`, by name, and where the function has them among these.
    """

    function: StepFunction
    compiled: bool
    theta: Tensor
    parts: list[Tensor]
    scalars: Tensor
    seed: int
    step: int
    factored: Mapping[str, int] = field(default_factory=dict)

    def stream(self, start: int = 0, stop: int | None = None, *, first_block: int) -> StreamedStep:
        """For the elements from `start` to `stop`; `start` is a multiple of BLOCK.

        `first_block` is the number, in the whole parameter group and over all ranks, of the block at `start`.
        """
        assert not self.factored
        theta, parts = self.theta, self.parts
        if start or stop is not None:
            first = start // BLOCK
            theta = theta[start:stop]
            parts = [part[first : first + -(-theta.numel() // BLOCK)] for part in parts]
        return StreamedStep(
            self.function, self.compiled, theta, parts, self.scalars, (self.seed, self.step, first_block)
        )

    def write_back(self, tensor: Tensor) -> None:
        """Copy the weights into `tensor`, if they could not be viewed as flat."""
        if self.theta.data_ptr() != tensor.data_ptr():
            tensor.copy_(self.theta.view_as(tensor))
