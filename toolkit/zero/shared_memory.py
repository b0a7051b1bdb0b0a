"""DeepSpeed's all-reduce over /dev/shm, which inference alone calls, is not set up.

On CPUs `deepspeed.init_distributed` compiles it, for a minute at a machine's first run, and takes 69 MB of /dev/shm for
each rank, for good. Where there is less (Docker gives a container 64 MB) a rank ends in a segmentation fault.
"""

from __future__ import annotations

import sys

import deepspeed.comm  # noqa: F401 (its attribute `torch` is PyTorch, so its module of that name is looked up)

_MODULE = "deepspeed.comm.torch"


def found() -> bool:
    """Whether DeepSpeed has what `leave_out` replaces."""
    return callable(vars(sys.modules[_MODULE]).get("build_shm_op"))


def leave_out() -> None:
    """Let process groups that are joined from now on do without it."""
    vars(sys.modules[_MODULE])["build_shm_op"] = lambda: None
