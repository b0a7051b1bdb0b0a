"""What a killed build of an extension leaves behind: torch's lock, for which later starts would wait forever."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

# Where another machine may hold a lock, which cannot be seen from here.
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "gluster", "9p", "afs", "fuse")


def release_locks() -> None:
    """Remove locks that processes left when they were killed while torch built an extension for DeepSpeed.

    Torch waits for such a lock forever. Locks that are there are watched beside the start, and removed once no process
    has them open or works in their folder. Those on network file systems stay.
    """
    locks = [lock for lock in _locks() if _local(lock)]
    if locks and Path("/proc/self/fd").is_dir():
        threading.Thread(target=_release, args=(locks,), name="locks", daemon=True).start()


def _locks() -> list[Path]:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given is not None:
        return list(Path(given).glob("*/lock"))
    from torch.utils.cpp_extension import get_default_build_root

    return list(Path(get_default_build_root()).glob("*/*/lock"))


def _local(path: Path) -> bool:
    import psutil

    path = path.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[parent] for parent in path.parents if parent in mounts), "")
    return not kind.startswith(_NETWORK)


def _release(locks: list[Path], pause: float = 1.0) -> None:
    """Until all are gone: remove each when its owner is."""
    while locks:
        for lock in list(locks):
            with contextlib.suppress(OSError):
                before = lock.stat()
                # Others' processes cannot be looked into.
                if before.st_uid == os.getuid() and not _held(lock) and lock.stat().st_ctime_ns == before.st_ctime_ns:
                    lock.unlink()
        locks = [lock for lock in locks if lock.exists()]
        time.sleep(pause if locks else 0)


def _held(lock: Path) -> bool:
    """Whether a process has `lock` open, as its owner does, or works in its folder, as a compiler does."""
    wanted = {str(lock.resolve()), str(lock.resolve().parent)}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for link in (process / "cwd", *(process / "fd").iterdir()):
                with contextlib.suppress(OSError):
                    if os.readlink(link) in wanted:
                        return True
    return False
