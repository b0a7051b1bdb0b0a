"""Writing the files of a checkpoint: plain content only, hashed as it is written, and on the disk when it is done."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import math
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.state.layout import dtype_name

_SCALARS = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def plain(value: Any, tensor: Callable[[Tensor], Tensor]) -> Any:
    """`value` in types that torch.load(weights_only=True) reads, its tensors through `tensor`.

    DeepSpeed saves objects of its own classes: enumerations become their values, others a dict of their fields.
    """
    if isinstance(value, Tensor):
        return tensor(value.detach())
    if isinstance(value, enum.Enum):
        return plain(value.value, tensor)
    if value is None or type(value) in _SCALARS:
        return value
    if isinstance(value, Mapping):
        made = {plain(key, tensor): plain(item, tensor) for key, item in value.items()}
        return OrderedDict(made) if isinstance(value, OrderedDict) else made
    if hasattr(value, "_asdict"):  # a named tuple
        return plain(value._asdict(), tensor)
    if isinstance(value, list | tuple | set | frozenset):
        return (
            [plain(item, tensor) for item in value]
            if isinstance(value, list)
            else tuple(plain(item, tensor) for item in value)
        )
    if hasattr(value, "item"):  # a number of numpy's
        return value.item()
    if hasattr(value, "__dict__") and not callable(value):
        return plain(vars(value), tensor)
    return str(value)


def is_plain(value: Any) -> bool:
    """Whether `plain` leaves `value` what it is."""
    if isinstance(value, Mapping):
        return type(value) in (dict, OrderedDict) and all(
            is_plain(key) and is_plain(item) for key, item in value.items()
        )
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(is_plain(item) for item in value)
    return value is None or isinstance(value, Tensor) or type(value) in _SCALARS


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory that shares nothing: a view would be saved with the whole storage behind it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def as_it_lies(tensor: Tensor) -> Tensor:
    """`tensor`, of host memory, without a copy but with a storage of its own: of a view the rest is not saved."""
    if not tensor.is_contiguous() or not tensor.numel():
        return on_host(tensor)
    own = torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy())
    return own.view(tensor.dtype).view(tensor.shape)


STAGED_BYTES = 64 << 20


class Staging:
    """Copies from a GPU to host memory like `on_host`, by way of two buffers of pinned memory.

    While the GPU fills one buffer at the speed of its bus, this thread empties the other. The driver copies into
    pageable memory at a fraction of that speed; to pin the whole copy takes long and keeps the memory from all else.

    Args:
        piece: bytes of a buffer. torch keeps both for the next time.
        pin: whether the buffers are pinned, without which there is nothing to gain.
    """

    def __init__(self, piece: int = STAGED_BYTES, *, pin: bool = True) -> None:
        self._buffers = [torch.empty(piece, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        # The oldest first: what is on its way into a buffer, where it goes from there, and what says that it is there.
        self._pending: list[tuple[Tensor, Tensor, torch.cuda.Event | None]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, complete after `finish`; `tensor` must not be written to on another stream until then."""
        if not tensor.is_contiguous():
            return on_host(tensor)
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        source, target = tensor.view(-1).view(torch.uint8), made.view(-1).view(torch.uint8)
        for from_there, to in zip(source.split(self._size), target.split(self._size), strict=True):
            if len(self._pending) == len(self._buffers):
                self._land()
            buffer = self._buffers[0][: to.numel()]
            self._buffers.reverse()
            buffer.copy_(from_there, non_blocking=True)
            event = None
            if tensor.is_cuda:
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(tensor.device))
            self._pending.append((buffer, to, event))
        return made

    @property
    def _size(self) -> int:
        return self._buffers[0].numel()

    def _land(self) -> None:
        buffer, to, event = self._pending.pop(0)
        if event is not None:
            event.synchronize()
        to.copy_(buffer)

    def finish(self) -> None:
        """Wait until all copies are complete."""
        while self._pending:
            self._land()


def squeeze(tensor: Tensor) -> Any:
    """A tensor of codes without what they repeat: most blocks use few of the codes there are. Inverse: `unsqueezed`."""
    import zstandard

    raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    packed = zstandard.ZstdCompressor(level=1).compress(raw.data)
    if len(packed) >= raw.nbytes:
        return tensor
    dtype = dtype_name(tensor.dtype)
    return {_ZSTD: torch.frombuffer(bytearray(packed), dtype=torch.uint8), "dtype": dtype, "shape": list(tensor.shape)}


def squeezed_as(value: Mapping[str, Any]) -> Tensor | None:
    """What `value` of `squeeze` will be, on the meta device; None where it is none or its size is not what it says."""
    import zstandard

    packed: Any = value.get(_ZSTD)
    shape: Any = value.get("shape")
    dtype = value.get("dtype")
    known = {dtype_name(code): code for code in _CODES}
    sizes = isinstance(shape, list) and len(shape) < 8 and all(type(n) is int and 0 <= n <= 1 << 53 for n in shape)
    flat = isinstance(packed, Tensor) and packed.dtype == torch.uint8 and packed.dim() == 1 and packed.is_contiguous()
    if not (sizes and flat and isinstance(dtype, str) and dtype in known):
        return None
    try:
        # The frame's own word is what the decompressor goes by, however little is packed in it.
        size = zstandard.frame_content_size(memoryview(packed.numpy()))
    except zstandard.ZstdError:
        return None
    return torch.empty(shape, dtype=known[dtype], device="meta") if size == math.prod(shape) else None


def unsqueezed(value: Any) -> Any:
    """What `squeeze` was given; all else as it is.

    Raises:
        ValueError: it would be of another size than it says, or is damaged.
    """
    if not isinstance(value, Mapping) or _ZSTD not in value:
        return value
    import zstandard

    made = squeezed_as(value)
    if made is None:
        raise ValueError("codes are not what they are said to be")
    try:
        raw = zstandard.ZstdDecompressor().decompress(memoryview(value[_ZSTD].numpy()), max_output_size=made.numel())
    except zstandard.ZstdError as error:
        raise ValueError(f"codes cannot be unpacked: {error}") from None
    return torch.frombuffer(bytearray(raw), dtype=made.dtype).view(made.shape)


_ZSTD = "zstd"
_CODES = (torch.int8, torch.uint8)


def _squeeze_states(content: Mapping[str, Any]) -> None:
    """Squeeze the codes of a rank's optimizer file, in place. Weights stay as DeepSpeed's tools expect them."""
    saved = content["optimizer_state_dict"]
    base = saved.get("base_optimizer_state") or saved["optimizer_state_dict"]
    for held in base["state"].values():
        for key, value in held.items():
            if isinstance(value, Tensor) and value.dtype in _CODES and value.numel():
                held[key] = squeeze(value)


class _Hashed:
    """A file that hashes what is written into it."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `finish`)
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        written = self._file.write(data)
        self._bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> dict[str, Any]:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # the disk is full: what the buffer holds cannot be written
            self._file.close()


def save(content: Any, path: Path, *, squeezed: bool = True) -> dict[str, Any]:
    """torch.save, synced to the disk; returns the file's entry in the manifest: `bytes` and `sha256`.

    Bytes are written as they are. With `squeezed` codes of optimizer state are squeezed, in `content` itself.

    Raises:
        OSError: it cannot be written.
    """
    if squeezed and isinstance(content, Mapping) and "optimizer_state_dict" in content:
        _squeeze_states(content)
    file: Any = _Hashed(path)
    try:
        if isinstance(content, bytes):
            file.write(content)
        else:
            torch.save(content, file)
        return file.finish()
    except RuntimeError as error:
        # torch's writer reports an OSError of the file below it as its own failure.
        cause = error.__context__ or error.__cause__
        raise cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0]) from error
    finally:
        file.abandon()


def new_file_mode(path: Path) -> None:
    """Give `path` the permissions that a file made here by `open` has: by the umask, or as its folder says."""
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    path.chmod(stat.S_IMODE(probe.stat().st_mode))
    probe.unlink()


def synced(path: Path) -> None:
    """Wait until the file `path` is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
