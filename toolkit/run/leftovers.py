"""What killed processes leave behind: torch's lock of a build, for which later starts would wait forever, and files in
shared memory."""

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

SHARED_MEMORY = Path("/dev/shm")
_SHARED = ("nccl-*", "torch_*", "deepspeed_*")
_YOUNG_SECONDS = 60.0

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
            if not _mine(lock) or not _local(lock):
                locks.remove(lock)
                name = lock.parent.name
                _say(f"{lock} may be another user's or machine's: a start that needs {name} waits until it is removed.")
    since, told = time.monotonic(), False
    while locks:
        for lock in list(locks):
            if _removed(lock):
                _say(f"removed {lock}, left by a process that was killed while it built {lock.parent.name}.")
        locks = [lock for lock in locks if lock.exists()]
        if locks and not told and time.monotonic() > since + TOLD_SECONDS:
            told = True
            _say(f"process {_held(locks[0])} holds {locks[0]}: a start that needs {locks[0].parent.name} waits for it.")
        time.sleep(pause if locks else 0)


def _removed(lock: Path) -> bool:
    """Remove a lock that no process holds; whether that was done."""
    with contextlib.suppress(OSError):
        before = lock.stat()
        if not _held(lock) and lock.stat().st_ctime_ns == before.st_ctime_ns:
            lock.unlink()
            return True
    return False


def removed() -> list[Path]:
    """Remove what killed processes of this user left on this machine: build locks, files in shared memory."""
    locks = [lock for lock in find_locks() if _mine(lock) and _local(lock)]
    gone = [lock for lock in locks if _removed(lock)]
    for path in left_in_shared_memory():
        with contextlib.suppress(OSError):
            path.unlink()
            gone.append(path)
    return gone


def left_in_shared_memory() -> list[Path]:
    """Files of NCCL, torch and DeepSpeed in shared memory that no process has open or mapped: of killed runs.

    They are this user's, and older than a process takes between making one and mapping it.
    """
    old = time.time() - _YOUNG_SECONDS
    found = {}
    for path in (path for pattern in _SHARED for path in SHARED_MEMORY.glob(pattern)):
        with contextlib.suppress(OSError):
            if _mine(path) and path.stat().st_mtime < old:
                found[str(path)] = path
    for process in Path("/proc").glob("[0-9]*") if found else ():
        with contextlib.suppress(OSError):
            held = {line.split(maxsplit=5)[-1].strip() for line in (process / "maps").open()}
            held.update(os.readlink(link) for link in (process / "fd").iterdir() if link.is_symlink())
            for name in held.intersection(found):
                del found[name]
    return sorted(found.values())


def _mine(path: Path) -> bool:
    return path.stat().st_uid == os.getuid()


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
