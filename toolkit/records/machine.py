"""What this process has of its machine: the other ranks there, its cores, and the control groups that limit it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
"""Of the file system; tests have another."""


def local_size() -> int:
    """Ranks on this machine."""
    # DeepSpeed's launcher sets the first, torchrun the second.
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")


def cores() -> int:
    """Cores that this process may use, which containers and SLURM make fewer than the machine's: as many as it may run
    on, or as a CPU quota (`docker --cpus`, a limit of Kubernetes) gives it time for, rounded up."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([here, *(max(1, math.ceil(quota)) for quota in _quotas())])


def _quotas() -> Iterator[float]:
    """Cores by control group that has a limit of its processes' time."""
    for folder, version in control_group_folders("cpu", ROOT):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:  # version 1 has -1 where there is no limit
                yield int(quota) / int(period)


def control_group_folders(controller: str, files: Path) -> Iterator[tuple[Path, int]]:
    """Folders of this process's control group and of those above it, and their version, 2 or 1; not all are there.

    `files`: the root of the file system.
    """
    root = files / "sys" / "fs" / "cgroup"
    try:
        lines = (files / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or controllers and controller not in controllers.split(","):
            continue
        first, version = (root / controller, 1) if controllers else (root, 2)
        if controllers and not first.is_dir():
            first = root / controllers  # mounted as "cpu,cpuacct", without a link named "cpu"
        own = first / path.lstrip("/")
        for folder in (own, *own.parents):
            yield folder, version
            if folder == first:
                break
