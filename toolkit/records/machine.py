"""The other ranks of a run that are on this machine."""

from __future__ import annotations

import os


def local_size() -> int:
    """Ranks on this machine."""
    # DeepSpeed's launcher sets the first, torchrun the second.
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")
