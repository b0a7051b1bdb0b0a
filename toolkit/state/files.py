"""State that lies in files, so that a disk has it and not the host's memory.

A step goes through the state once, from its beginning to its end. A file that is mapped into memory serves it as any
tensor does: the operating system reads ahead, keeps what there is room for, and writes back what was changed. Whoever
saves, loads or looks at the state sees tensors, and nothing is needed beside the operating system.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from toolkit.errors import UserError, but
from toolkit.printable import warn_once

logger = logging.getLogger("toolkit")

IN_MEMORY = ("tmpfs", "ramfs")
"""File systems whose files take the memory that was to be saved."""

_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE, which Python has no name for."""

_places: dict[int, tuple[weakref.ref[mmap.mmap], int]] = {}
"""By a tensor's address: the mapping that it is a part of, and where it begins in it."""


class StateFiles:
    """Makes tensors that are files in `folder`.

    The files have no names there: whatever ends the process, the disk has its room back.

    Raises:
        UserError: `folder` is none that files can be made in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()  # a program may change its working folder before the first step
        problem = problem_of(folder)
        if problem is not None:
            raise UserError(f"nvme_path is {str(folder)!r}, {but(problem)}")
        kind = _file_system(folder)
        if kind in IN_MEMORY:
            warn_once(logger, "nvme_path %s is of type %s, which lies in memory itself: it saves none", folder, kind)

    def zeros(self, wanted: Mapping[str, tuple[tuple[int, int], torch.dtype]]) -> dict[str, Tensor]:
        """Tensors of these shapes and types, filled with zeros, in one file.

        Raises:
            UserError: the disk has no room for it. All of it is set aside at once, so that no later step finds it full.
        """
        sizes = {key: rows * lanes * dtype.itemsize for key, ((rows, lanes), dtype) in wanted.items()}
        starts, size = {}, 0
        for key, one in sizes.items():
            starts[key] = size
            size += -(-one // mmap.PAGESIZE) * mmap.PAGESIZE
        if not size:
            return {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in wanted.items()}
        mapped = self._mapped(size)
        for address in [address for address, (there, _) in _places.items() if there() is None]:
            del _places[address]
        made = {}
        for key, (shape, dtype) in wanted.items():
            if not sizes[key]:  # which no buffer can be
                made[key] = torch.zeros(shape, dtype=dtype)
                continue
            count = shape[0] * shape[1]
            made[key] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=starts[key]).view(shape)
            _places[made[key].data_ptr()] = (weakref.ref(mapped), starts[key])
        return made

    def _mapped(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:  # it is full, or gone; a file is a file descriptor, too
            raise UserError(
                f"nvme_path {str(self.folder)!r} does not take {size / 1e9:.3g} GB more of the optimizer's state: "
                f"{error.strerror}."
            ) from None


def problem_of(folder: Path) -> str | None:
    """What is wrong with a folder for `StateFiles`, as `errors.but` takes it; None if nothing."""
    if not folder.is_dir():
        return "must be a folder that exists"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"takes no files: {error.strerror}"


def lies_in_file(tensor: Tensor) -> bool:
    """Whether `tensor` is one that `StateFiles` made, or a part of one."""
    return next(_spans([tensor]), None) is not None


def read_ahead(tensors: Iterable[Tensor]) -> None:
    """Begin to read these, as far as they lie in files: they are used next."""
    _advise(tensors, mmap.MADV_WILLNEED)


def bring_in(tensors: Iterable[Tensor]) -> None:
    """Make these ready to be read and written, as far as they lie in files: page by page, as a step comes upon them, it
    takes half as long again (a Linux before 5.14 does that)."""
    if _places:
        with contextlib.suppress(OSError):
            _advise(tensors, _POPULATE_WRITE)


def let_go(tensors: Iterable[Tensor]) -> None:
    """Take these out of this process's memory, as far as they lie in files; the operating system may keep them.

    Else what has been used counts as the process's own until nothing else is left, and pushes out what is used again.
    """
    _advise(tensors, mmap.MADV_DONTNEED)


def _advise(tensors: Iterable[Tensor], advice: int) -> None:
    if not _places:  # of most runs; this is asked in every call of the step
        return
    for mapped, start, stop in _spans(tensors):
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(advice, begin, stop - begin)


def _spans(tensors: Iterable[Tensor]) -> Iterator[tuple[mmap.mmap, int, int]]:
    """Of each that is in a file and not empty: the mapping, and from where to where in it."""
    for tensor in tensors:
        base = tensor.untyped_storage().data_ptr()
        there, start = _places.get(base, (None, 0))
        mapped = there() if there is not None else None
        if mapped is not None and tensor.numel():
            begin = start + tensor.data_ptr() - base
            yield mapped, begin, begin + tensor.nbytes


def _file_system(folder: Path) -> str:
    """The type of that on which `folder` lies; empty where it is not known."""
    import psutil

    held = [one for one in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(one.mountpoint)]
    return max(held, key=lambda one: len(one.mountpoint)).fstype if held else ""
