"""Packed sequences on disk: one process of a machine reads and tokenizes, the others read what it has written.

A file holds a group of sequences and the position after it. Its name is made of what both depend on: the folder's of
corpus, tokenizer, seed and sequence length, the file's of the position before it. So the ranks of a run, a run that is
resumed and another run of the same data share files, and a file is the group that would be made now, or is not there.
`datasets` caches whole tables, before the first sequence could be handed out; a stream has no end to wait for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from toolkit.data.pack import Group, PackedTokens
from toolkit.data.passes import Position
from toolkit.paths import cache_folder, draft_of

logger = logging.getLogger("toolkit")

FOLDER = "LEANSTATE_TOKEN_CACHE"
"""Names another folder, or is "off"."""
LIMIT = 16 << 30
"""Bytes of all token caches together; the longest unused ones are removed."""
_SPARED, _SPARED_SHARE = 2 << 30, 20
"""Bytes, and the part of a disk (one in so many), that stay free: runs and others write there, too."""
_LAG = 8
"""Groups that other ranks may be behind by, and read still."""
_LIBRARIES = ("tokenizers", "transformers", "pyarrow", "numpy")
_POLL_SECONDS = 0.02
_SUBFOLDER, _NAME = "leanstate-tokens", re.compile(r"[0-9a-f]{24}")


class Closed(Exception):
    """Ends a thread that waits for a group which nobody wants any more."""


class TokenCache:
    """The groups of one stream, in a folder of their own.

    Any rank may be the one that makes them: the first that misses a group and finds the run's lock free. It makes all
    that follow. When it ends, however that is, the lock is free, and the next rank that misses a group takes it. A
    rank that cannot write makes its groups for itself alone, and says so.

    Args:
        folder: of this stream; made when it is needed.
        run: names the lock. Other runs have their own, so that none waits for a slower one.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        name = hashlib.sha256(f"{socket.gethostname()} {run}".encode()).hexdigest()[:16]
        self._lock_path = folder / f"{name}.lock"
        self._lock: IO[str] | None = None
        self._changing = threading.Lock()
        """Held where `_lock` changes: `close` comes from another thread."""
        self._alone = False
        self._closed = threading.Event()
        self._written: list[tuple[Path, int]] = []
        self.made = 0
        """Groups that this process has read and tokenized."""

    def groups(self, make: Callable[[Position], Iterator[Group]], start: Position) -> Iterator[Group]:
        """The groups from `start` on, without end; `make` makes them.

        Raises:
            UserError: of `make`; every rank gets there.
            Closed: after `close`.
        """
        made: Iterator[Group] | None = None
        with contextlib.suppress(OSError):
            os.utime(self.folder)  # as `_make_room` wants to know
        while True:
            # Once it makes groups, it makes all: to find the place in the documents again would take longer.
            passed = made is None and self._passed(start)  # looked for first: what was written before it is there
            group = self._read(start) if made is None else None
            if group is None and made is None and not (self._alone or self._claimed()):
                # Removed before this rank has read it, by another run that made room: nobody will make it again.
                self._alone = passed and self._lock is None
                if self._closed.wait(_POLL_SECONDS):
                    raise Closed
                continue
            if group is None:
                made = made or make(start)
                try:
                    group = next(made)
                except BaseException:
                    self._release()  # for the others, who must come to the same end
                    raise
                self.made += 1
                if not self._alone:
                    group = self._write(start, group)
            yield group
            start = group.following

    @property
    def kept(self) -> bool:
        """Whether what this process makes can be written, as far as it knows."""
        return not self._alone

    def close(self) -> None:
        self._closed.set()
        self._release()

    def _path(self, start: Position) -> Path:
        place = hashlib.sha256(json.dumps(asdict(start)).encode()).hexdigest()[:16]
        return self.folder / f"{start.epoch}-{start.window}-{start.index}-{place}.npy"

    def _read(self, start: Position) -> Group | None:
        """The group from `start` on, its tokens left on disk; None where there is none, or one that is damaged."""
        path = self._path(start)
        try:
            tokens = np.load(path, mmap_mode="r")
            with open(path, "rb") as file:
                file.seek(tokens.offset)
                crc = 0
                left = tokens.nbytes
                while left:
                    part = file.read(min(left, 1 << 20))
                    crc, left = zlib.crc32(part, crc), left - len(part)
                    if not part:
                        return None
                facts = json.loads(file.read())  # cut short, it would be no JSON
            return Group(tokens, Position(**facts["following"])) if facts["crc"] == crc else None
        except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError):
            return None

    def _write(self, start: Position, group: Group) -> Group:
        """Write the group and return it as it lies on disk; as it is where that fails."""
        path = self._path(start)
        draft = draft_of(path)
        try:
            disk = shutil.disk_usage(self.folder)
            if disk.free < max(_SPARED, disk.total // _SPARED_SHARE):
                raise OSError(errno.ENOSPC, "the disk is nearly full")
            with open(draft, "xb") as file:
                np.save(file, group.tokens)
                crc = zlib.crc32(group.tokens.data)
                file.write(json.dumps({"following": asdict(group.following), "crc": crc}).encode())
                size = file.tell()
            os.replace(draft, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            self._give_up(error)
            return group
        lock = self._lock
        if lock is not None:
            with contextlib.suppress(OSError, ValueError):  # closed meanwhile
                lock.truncate(0)
                lock.write(json.dumps(start.place))
                lock.flush()
        self._written.append((path, size))
        while sum(size for _, size in self._written) > LIMIT:
            with contextlib.suppress(OSError):
                self._written.pop(0)[0].unlink(missing_ok=True)
        return self._read(start) or group

    def _claimed(self) -> bool:
        """Whether it is this process that makes the groups; looks whether it may be. Not before it has looked again
        for a file, which the last one may have written just before it ended."""
        if self._lock is not None:
            return True
        try:
            with self._changing:
                if self._closed.is_set():
                    raise Closed
                self._lock = self._locked()
        except OSError as error:
            self._give_up(error)
            return True
        if self._lock is not None:
            self._make_room()
        return False

    def _locked(self) -> IO[str] | None:
        """The lock's file, locked by this process; None where another one has it, or has just removed it."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(open(self._lock_path, "a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(lock.fileno()), os.stat(self._lock_path)):
                    return None
            except (BlockingIOError, FileNotFoundError):
                return None
            lock.truncate(0)
            stack.pop_all()  # open as long as it is held
            return lock

    def _passed(self, start: Position) -> bool:
        """Whether the rank that makes groups has written one from `start` on or behind it, and will not come back."""
        try:
            return tuple(json.loads(self._lock_path.read_text())) >= start.place
        except (OSError, ValueError, TypeError):
            return False

    def _release(self) -> None:
        with self._changing:
            lock, self._lock = self._lock, None
            if lock is not None:
                with contextlib.suppress(OSError):
                    self._lock_path.unlink(missing_ok=True)
                lock.close()

    def _give_up(self, error: OSError) -> None:
        self._alone = True
        self._release()
        for path, _ in self._written[:-_LAG]:  # a quota does not show before it is reached
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if not self._closed.is_set():
            logger.warning(
                "tokens are not kept in %s (%s): this rank reads and tokenizes for itself; %s names another folder",
                self.folder,
                error.strerror or error,
                FOLDER,
            )

    def _make_room(self) -> None:
        """Remove the caches that have not been used for longest, until the others take at most LIMIT."""
        with contextlib.suppress(OSError):
            others = [
                path
                for path in self.folder.parent.iterdir()
                if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
            ]
            others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            total = 0
            for path in others:
                total += sum(file.stat().st_size for file in path.iterdir())
                if total > LIMIT and path != self.folder:
                    shutil.rmtree(path, ignore_errors=True)


def open_cache(packed: PackedTokens, identity: Mapping[str, Any], run: str) -> TokenCache | None:
    """The cache of the sequences that `packed` gives; None where the user wants none.

    Args:
        identity: what else tells one stream from another: the corpus, the tokenizer, the order.
        run: a name of this start of a run, the same on all of its ranks and nobody else's.
    """
    named = os.environ.get(FOLDER, "")
    if named == "off":
        return None
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(__file__).parent.glob("*.py"))]
    facts = [identity, packed.documents.state, packed.documents.bad, packed.tokenizer.eos_token_id, code]
    facts += [metadata.version(name) for name in _LIBRARIES]
    # A hub's data, or a tokenizer written in Python, may be others the next time, and nothing here would tell: its
    # tokens are shared by the ranks of this start alone.
    if not packed.documents.state or not getattr(packed.tokenizer, "is_fast", False):
        facts.append(run)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    root = Path(named).expanduser() / _SUBFOLDER if named else cache_folder() / "tokens"
    return TokenCache(root / digest[:24], run)
