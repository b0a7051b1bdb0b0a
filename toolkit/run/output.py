"""Standard output and error that outlive whoever reads them: `| head -1`, a terminal whose session was closed.

Python raises an OSError wherever the next line is written, in the middle of whatever is being done. Nothing that was
asked for depends on a reader, so the work is done and what nobody can read is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class Outliving:
    """A text stream as `stream`, except that writing never fails; `lost` is called once, when the reader is gone."""

    def __init__(self, stream: TextIO, lost: Callable[[], None]) -> None:
        self._stream = stream
        self._lost = lost
        self._gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:  # a full disk behind it may have room again later
            if error.errno in _GONE and not self._gone:
                self._gone = True
                with contextlib.suppress(OSError, ValueError):  # for what else is written there, in C and at exit
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self._stream.fileno())
                    os.close(nowhere)
                self._lost()


@contextlib.contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Where `wanted`, all that is printed within goes to stderr, also from C: stdout is for what comes after."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def outliving(told: str = "") -> Iterator[None]:
    """Both streams of this process outlive their readers; rank 0 says `told` on stderr when nobody reads stdout."""
    before = sys.stdout, sys.stderr
    error = Outliving(sys.stderr, lambda: None)

    def lost() -> None:
        if told and os.environ.get("RANK", "0") == "0":
            error.write(f"note: {told}\n")
            error.flush()

    sys.stdout, sys.stderr = Outliving(sys.stdout, lost), error
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
