"""What checkpointed blocks keep, their inputs, in the memory of the host between the two passes.

On a GPU copies run on a stream of their own, beside the blocks that compute. What orders them are events alone, so that
the host never waits and memory is the same however far it runs ahead:

* Out: the copy waits for what made the tensor. The tensor is let go when the next block's input comes, after the
  computing stream has been told to wait for the copy: whatever gets its memory next begins later.
* Back: with each block's input that is used, the copy of the one before it begins, into memory of the computing stream,
  after what that stream has to do so far; the stream waits for it before it uses it, or lets go of it.

So the device holds two inputs at most. A block's copy out is long over when that of another begins on the same stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**20
"""Bytes of the smallest piece of host memory."""

Checkpoint = Callable[..., Any]
"""As `torch.utils.checkpoint.checkpoint`: a function and its arguments."""


class HostActivations:
    """Inputs of checkpointed blocks, on their way to the host, there, and back; one for all blocks of a model.

    On a CPU, and for tensors there, copies are plain ones. In a dry run (on the meta device) nothing is copied, and
    `held` counts.
    """

    def __init__(self) -> None:
        self.held = 0
        """Bytes on the host now."""
        self.most = 0
        """The most that there were."""
        self._stream: Any = None
        self._leaving: _Input | None = None
        self._fetched: _Input | None = None
        self._latest: Callable[[], _Input | None] = lambda: None

    def wrap(self, checkpoint: Checkpoint) -> Checkpoint:
        """`checkpoint`, whose tensors that require a gradient lie on the host until they are used again."""

        def offloaded(function: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return checkpoint(function, *args, **kwargs)
            # Everything within is saved by the checkpoint's own hooks: these see its arguments alone. What a hook is
            # given shares their storage.
            wanted = {_key(arg) for arg in args if isinstance(arg, Tensor) and arg.requires_grad}
            with saved_tensors_hooks(lambda x: self._pack(x) if _key(x) in wanted else x, self._unpack):
                return checkpoint(function, *args, **kwargs)

        offloaded.host = self  # type: ignore[attr-defined]
        return offloaded

    def _pack(self, x: Tensor) -> _Input:
        one = _Input(self, x.detach(), self._latest())
        self._settle()
        self._latest = weakref.ref(one)
        self._leaving = one
        one.send()
        return one

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Input):
            tensor: Tensor = packed
            return tensor
        before = packed.before()
        if packed.here is None:
            packed.fetch()
        found = packed.take()
        self._settle()
        if before is not None and before.here is None:
            before.fetch()
            self._fetched = before
        return found

    def _settle(self) -> None:
        """Let go of what is on its way, in either direction."""
        for one in (self._leaving, self._fetched):
            if one is not None and one.here is not None:
                one.take()
        self._leaving = self._fetched = None

    def copying(self, device: torch.device) -> Any:
        """The stream of the copies, which waits for what the current one has to do so far; None without streams."""
        if device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream


class _Input:
    """One tensor. `here`: it on the device, as long as it is there; what has used it and what copies it are ordered by
    `take`, which must have been called when it is let go."""

    def __init__(self, host: HostActivations, x: Tensor, before: _Input | None) -> None:
        self._host = host
        self.here: Tensor | None = x.contiguous()
        self.before: Callable[[], _Input | None] = weakref.ref(before) if before is not None else lambda: None
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        self._parts: list[Tensor] = []
        self._copied: Any = None
        self._sizes = _pieces(x.numel() * x.element_size())
        host.held += sum(self._sizes)
        host.most = max(host.most, host.held)
        weakref.finalize(self, _forget, host, sum(self._sizes))

    def send(self) -> None:
        """Begin to copy it to the host."""
        assert self.here is not None
        if self._device.type == "meta":
            return
        pinned = self._device.type == "cuda"
        self._parts = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in self._sizes]
        self._copy(lambda here, part: part.copy_(here, non_blocking=pinned))

    def fetch(self) -> None:
        """Begin to copy it back."""
        self.here = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        if self._device.type != "meta":
            self._copy(lambda here, part: here.copy_(part, non_blocking=True))

    def take(self) -> Tensor:
        """It on the device, for what is queued from now on; nothing here holds it any more."""
        found, self.here = self.here, None
        assert found is not None
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        return found

    def _copy(self, move: Callable[[Tensor, Tensor], Any]) -> None:
        assert self.here is not None
        stream = self._host.copying(self._device)
        flat = self.here.view(-1).view(torch.uint8)
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            start = 0
            for part in self._parts:
                some = flat[start : start + part.numel()]
                move(some, part[: some.numel()])
                start += part.numel()
        self._copied = stream.record_event() if stream is not None else None


def _pieces(size: int) -> list[int]:
    """Sizes of pieces of host memory for `size` bytes, each a power of two: torch rounds pinned memory up to one."""
    units = -(-size // SMALLEST)
    return [SMALLEST << bit for bit in reversed(range(units.bit_length())) if units >> bit & 1]


def _forget(host: HostActivations, size: int) -> None:
    host.held -= size


def _key(x: Tensor) -> tuple[Any, Any]:
    return x.untyped_storage()._cdata, x.storage_offset()
