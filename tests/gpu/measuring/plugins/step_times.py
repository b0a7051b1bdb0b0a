"""For `--plugin`: how long each step of the ZeRO optimizer takes on the device, to the file in LEANSTATE_STEP_TIMES."""

from __future__ import annotations

import atexit
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from toolkit.zero.stage12 import ShardedZeroOptimizer

_spans: list[tuple[Any, Any]] = []
_step = ShardedZeroOptimizer.step


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _timed(self: Any, *args: Any, **kwargs: Any) -> Any:
    began = _now()
    result = _step(self, *args, **kwargs)
    _spans.append((began, _now()))
    return result


def _write() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        seconds = [began.elapsed_time(ended) / 1e3 for began, ended in _spans]
    else:
        seconds = [ended - began for began, ended in _spans]
    Path(os.environ["LEANSTATE_STEP_TIMES"]).write_text(json.dumps(seconds))


ShardedZeroOptimizer.step = _timed  # type: ignore[method-assign]
atexit.register(_write)
