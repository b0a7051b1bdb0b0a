"""What a killed build of an extension leaves behind: torch's lock, for which later starts would wait forever."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

TOLD_SECONDS = 20.0
"""How long a lock that is held may stand before that is said."""
LITTLE_SHARED_MEMORY = 32 * 1024**2
"""Bytes: NCCL takes about 10 MB for each pair of neighbours on a machine."""

# Where another machine may hold a lock, which cannot be seen from here.
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "gluster", "9p", "afs", "fuse")


def own_build_folder() -> None:
    """Have torch build extensions in a folder of this environment's own, below the usual one.

    Of two environments that share a folder each rebuilds, at every start, what the other has built.
    """
    root, name = _build_root(), _environment()
    if root.name != name:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(root / name)


def release_locks() -> None:
    """Remove locks that processes left when they were killed while torch built an extension for DeepSpeed.

    Torch waits for such a lock forever, and says nothing. Locks that are there are watched beside the start, and
    removed, with a note, once no process has them open or works in their folder. Those that another machine or user may
    hold stay, with a note.
    """
    locks = find_locks()
    if locks and Path("/proc/self/fd").is_dir():
        threading.Thread(target=_release, args=(locks,), name="locks", daemon=True).start()


def find_locks() -> list[Path]:
    """Locks of builds under way, or of builds that were killed."""
    """Locks of builds under way, or of builds that were killed."""
    root = _build_root()
    folders = [root, root.parent] if root.name == _environment() else [root]
    return [lock for folder in folders for lock in folder.glob("*/lock")]


def _build_root() -> Path:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given is not None:
        return Path(given)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def _environment() -> str:
    facts = (sys.prefix, sys.version, *(metadata.version(name) for name in ("torch", "deepspeed")))
    return f"env-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def little_shared_memory() -> str | None:
    """The clause for a /dev/shm that is full or nearly so, else None; NCCL and torch's workers exchange data there."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    free = found.f_bavail * found.f_frsize
    return f"/dev/shm has {free / 1e6:.1f} MB free" if free < LITTLE_SHARED_MEMORY else None


def _local(path: Path) -> bool:
    import psutil

    path = path.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[parent] for parent in path.parents if parent in mounts), "")
    return not kind.startswith(_NETWORK)


def _release(locks: list[Path], pause: float = 1.0) -> None:
    """Until all are gone: remove each when its owner is."""
    for lock in list(locks):
        with contextlib.suppress(OSError):
            if lock.stat().st_uid != os.getuid() or not _local(lock):
                locks.remove(lock)
                name = lock.parent.name
                _say(f"{lock} may be another user's or machine's: a start that needs {name} waits until it is removed.")
    since, told = time.monotonic(), False
    while locks:
        for lock in list(locks):
            with contextlib.suppress(OSError):
                before = lock.stat()
                if not _held(lock) and lock.stat().st_ctime_ns == before.st_ctime_ns:
                    lock.unlink()
                    _say(f"removed {lock}, left by a process that was killed while it built {lock.parent.name}.")
        locks = [lock for lock in locks if lock.exists()]
        if locks and not told and time.monotonic() > since + TOLD_SECONDS:
            told = True
            _say(f"process {_held(locks[0])} holds {locks[0]}: a start that needs {locks[0].parent.name} waits for it.")
        time.sleep(pause if locks else 0)


def _say(words: str) -> None:
    print(f"note: {words}", file=sys.stderr, flush=True)


def _held(lock: Path) -> int | None:
    """A process that has `lock` open, as its owner does, or works in its folder, as a compiler does."""
    wanted = {str(lock.resolve()), str(lock.resolve().parent)}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for link in (process / "cwd", *(process / "fd").iterdir()):
                with contextlib.suppress(OSError):
                    if os.readlink(link) in wanted:
                        return int(process.name)
    return None
