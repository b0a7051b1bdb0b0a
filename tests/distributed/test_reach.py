"""The timed all-reduce of `toolkit doctor --ranks`."""

from __future__ import annotations

import json
from pathlib import Path

from ranks import launched

from toolkit.run import reach


def test_ranks_time_an_all_reduce(tmp_path: Path) -> None:
    written = tmp_path / "found.json"
    status, said = launched(tmp_path, 2, Path(reach.__file__), str(written))
    assert status == 0, said
    seconds, backend = json.loads(written.read_text())
    assert 0.0 < seconds < 60.0 and backend in ("gloo", "nccl")
    assert reach.bus_bytes(seconds, 2) == reach.BYTES / seconds
