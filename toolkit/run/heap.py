"""What the C library does with memory that was freed, on CPUs.

glibc maps large pieces of memory by themselves, and gives them back as soon as they are freed. What it takes for large
grows with what is freed, up to 32 MiB: then most matrices of a model come out of its heap, and the holes that they
leave there stay with the process. It can be told to map all of them by themselves. Then the process holds what is
allocated, and the kernel fills each new piece with zeros, which takes time: so it is done where memory is scarce.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

MAPPED = 2 << 20
"""Bytes of a piece from which on it is mapped by itself."""

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_OF_THE_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
_TUNABLES = "GLIBC_TUNABLES"


def map_large() -> bool:
    """Let pieces of MAPPED bytes be mapped by themselves from now on.

    Returns whether that was done: it is not where the environment says what glibc is to do, nor without glibc.
    """
    if any(name in os.environ for name in _OF_THE_USER) or "glibc.malloc." in os.environ.get(_TUNABLES, ""):
        return False
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, MAPPED))


def give_back() -> None:
    """Give the kernel the holes that are in the heap now; takes some 0.1 s, and what is used again a little longer."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """A function of glibc, or None where the C library is another one."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
