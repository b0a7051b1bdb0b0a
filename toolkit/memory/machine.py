"""Memory of this machine, of which the control group of a container may have a part only."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path

import psutil

from toolkit.records.machine import control_group_folders


def host() -> str:
    return socket.gethostname()


def unused() -> int:
    """Bytes that processes of this machine, or of this control group, can still have."""
    rooms = [limit - used for limit, used in control_groups()]
    return max(0, min([psutil.virtual_memory().available, *rooms]))


def control_groups(files: Path = Path("/")) -> list[tuple[int, int]]:
    """By control group of this process with a limit, and those above it (version 2, or 1): the limit, and bytes that it
    holds (0 where that cannot be read).

    Files that the system keeps in memory until it needs it are left out. `files`: the root of the file system.
    """
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
    found = []
    for folder, version in control_group_folders("memory", files):
        most, held = names[version]
        with contextlib.suppress(OSError, ValueError):
            limit, used = int((folder / most).read_text()), 0
            with contextlib.suppress(OSError, ValueError):
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / held).read_text()) - int(stat.get("inactive_file", 0))
            found.append((limit, used))
    return found


def address_space() -> int | None:
    """Bytes of address space in use, which RLIMIT_AS counts: far more than are resident."""
    return psutil.Process().memory_info().vms if sys.platform == "linux" else None
