"""Gradients of ZeRO stages 1 and 2, from the backward pass to the step, without copies that can be avoided.

DeepSpeed copies each gradient into a bucket, out of it into a buffer for all parameters of which this rank holds any
part, flattens a group of those and casts it to fp32. Here a gradient is reduced in buckets to the ranks that own
parts of it; a rank keeps its own part, as it comes out of the reduction, until the step has used it. Alone, a rank
keeps the gradient that autograd made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager

from toolkit.zero.lending import lend
from toolkit.zero.shards import Member

NORM_CHUNK = 2**17
"""Elements at a time that a norm is taken of on a CPU, where a wider type is a copy."""


def takes_mean(kwargs: dict[str, Any]) -> bool:
    """Set aside in the arguments of a ZeRO optimizer of DeepSpeed how its mean over ranks is to be scaled on the way.

    `prescale_gradients` and `gradient_predivide_factor` decide when a sum is divided by the number of ranks, not by
    what. Gradients are divided before they are added up here, always; DeepSpeed refuses both where it does so, too.

    Returns whether either was asked for.
    """
    asked = not kwargs.get("postscale_gradients", True) or kwargs.get("gradient_predivide_factor", 1.0) != 1.0
    kwargs.update(postscale_gradients=True, gradient_predivide_factor=1.0)
    return asked


@dataclass
class GradientFragment:
    """This rank's part of the averaged gradient of `param`, flat."""

    param: Tensor
    group: int
    offset: int
    gradient: Tensor


@dataclass
class Reducer:
    """Averages gradients over ranks, bucket by bucket, each part at the rank that owns it.

    Args:
        deliver: called with the parameters of a bucket and this rank's fragments of their gradients.
        members: by id of the parameter, which rank holds what of it.
        divisor: what the sum over ranks is divided by.
        bucket_elements: gradients wait until so many elements are there.
        dtype: that of the communication.
        overlap: let a bucket's reduction run until the next bucket is full.
    """

    deliver: Callable[[Sequence[Tensor], list[GradientFragment]], None]
    members: Mapping[int, Member]
    divisor: float
    bucket_elements: int
    dtype: torch.dtype
    overlap: bool
    _waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _elements: int = 0
    _running: list[tuple[list[Any], list[Tensor], Callable[[], None]]] = field(default_factory=list)

    def add(self, param: Tensor, gradient: Tensor) -> None:
        """Take the gradient of `param`; nobody else may hold on to it."""
        process_group = self.members[id(param)].process_group
        if self._waiting:
            before = self.members[id(self._waiting[0][0])].process_group
            if before is not process_group or any(param is other for other, _ in self._waiting):
                self.flush()
        if gradient.numel() >= self.bucket_elements:
            self.flush()  # so that what waits does not lie beside a large one
        self._waiting.append((param, gradient.reshape(-1)))
        self._elements += gradient.numel()
        del gradient  # what waits is all that holds it
        if self._elements >= self.bucket_elements or dist.get_world_size(process_group) == 1:
            self.flush()

    def flush(self) -> None:
        """Reduce what is waiting."""
        self._begin()
        if not self.overlap:
            self.wait()

    def _begin(self) -> None:
        """Start that, alone finish it; of a bucket nothing is left here then but what comes out of it."""
        bucket, self._waiting, self._elements = self._waiting, [], 0
        if not bucket:
            return
        process_group = self.members[id(bucket[0][0])].process_group
        params = [param for param, _ in bucket]
        by_owner: dict[int, list[GradientFragment]] = {}
        for param, gradient in bucket:
            member = self.members[id(param)]
            for part in member.fragments:
                piece = GradientFragment(param, member.group, part.offset, gradient[part.start : part.stop])
                by_owner.setdefault(part.rank, []).append(piece)
        if dist.get_world_size(process_group) == 1:
            self.deliver(params, by_owner[0])
            return
        self.wait()
        rank = dist.get_rank(process_group)
        mine: list[GradientFragment] = []
        works, buffers, shared = [], [], False
        with _together(process_group, bucket[0][1].device) as grouped:
            for owner, pieces in by_owner.items():
                parts = [piece.gradient for piece in pieces]
                buffer = parts[0] if len(parts) == 1 else torch.cat(parts)
                buffer = buffer.div_(self.divisor).to(self.dtype)
                root = dist.get_global_rank(process_group, owner)
                waits = self.overlap or grouped is not None
                work = lend(lambda part, root=root: dist.reduce(part, root, group=process_group, async_op=True), buffer)
                if waits:
                    works.append(work)
                    buffers.append(buffer)
                else:
                    work.wait()
                del work
                if owner == rank:
                    mine = pieces
                    # A view of a whole gradient would keep the parts of other ranks alive.
                    shared = buffer.untyped_storage().nbytes() > buffer.numel() * buffer.element_size()
                    for piece, part in zip(pieces, buffer.split([part.numel() for part in parts]), strict=True):
                        piece.gradient = part
        if grouped is not None:
            works = grouped.works

        def finish() -> None:
            if shared:
                for piece in mine:
                    piece.gradient = piece.gradient.clone()
            self.deliver(params, mine)

        self._running = [(works, buffers, finish)]

    def wait(self) -> None:
        """Finish the reductions that are still running."""
        running, self._running = self._running, []
        for works, buffers, finish in running:
            for work in works:
                if work is not None:
                    work.wait()
            buffers.clear()
            finish()


def _together(process_group: Any, device: torch.device) -> AbstractContextManager[Any]:
    """What is called inside starts as one, if the backend can (NCCL can); as gloo cannot, it yields None there."""
    if not process_group._get_backend(device).supports_coalescing:
        return nullcontext()
    return _coalescing_manager(process_group, device, async_ops=True)


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each tensor's elements, fp64 [n]; they lie on one device, and so does the result.

    No wider copy of a tensor is made.
    """
    if not tensors[0].is_cpu:
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)  # a few kernels for all of them
        return torch.stack(norms).double().square()
    squares = torch.zeros(len(tensors), dtype=torch.float64)
    for square, tensor in zip(squares, tensors, strict=True):
        for chunk in tensor.reshape(-1).split(NORM_CHUNK):
            square += torch.linalg.vector_norm(chunk, dtype=torch.float32).double() ** 2
    return squares


def squared_norm(tensors: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """The sum of the squares of all elements, fp64, 0-d, on `device`, wherever the tensors lie."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    here = [tensor for tensor in tensors if tensor.is_cpu]
    if here:
        # One after the other: the order in which `sum` adds depends on the machine.
        squares = torch.zeros((), dtype=torch.float64)
        for square in squared_norms(here):
            squares += square
        total += squares.to(device, non_blocking=True)
    if len(here) < len(tensors):
        total += squared_norms([tensor for tensor in tensors if not tensor.is_cpu]).sum()
    return total


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, once the device has done what is queued so far; on a CPU the tensor itself."""
    if tensor.is_cpu:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


class HostCopy:
    """A few numbers on their way from a device to the host.

    The copy is queued behind what the device has to do so far; `wait` waits for that and for nothing that is queued
    later. On a CPU the tensor is the copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copy, self._arrived = to_host(tensor), None
        if not tensor.is_cpu:
            self._arrived = get_accelerator().Event()
            self._arrived.record()

    def wait(self) -> Tensor:
        """The numbers, on the host, and with them whatever was queued to be copied there before. Without offload,
        ZeRO's step makes the host wait for the device nowhere else."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


def clip_scale(norm: Tensor, clip: float, loss_scale: float) -> Tensor:
    """What gradients are multiplied with, fp32: unscaled, and clipped to a global norm of `clip` (0: not).

    `norm` is that of the scaled gradients. As stage_1_and_2.py's `unscale_and_clip_grads`.
    """
    divisor = torch.full((), loss_scale, dtype=torch.float32, device=norm.device)
    if clip > 0.0:
        divisor = torch.clamp((norm.float() / loss_scale + 1e-6) / clip, min=1.0) * loss_scale
    return 1.0 / divisor
