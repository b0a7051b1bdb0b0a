"""When something has happened, on the host or on a GPU that works behind it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def steps_behind(device: torch.device) -> int:
    """Steps that the device is given before the loss of the last one is read: a GPU must not wait for the host."""
    return 0 if device.type == "cpu" else 1


class Moment:
    """Now; on a GPU when it has done what it has been given so far, by its own clock."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._host, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def until(self, later: Moment) -> float:
        """Seconds."""
        if self._event is None or later._event is None:
            return later._host - self._host
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1e3
