"""A run that does not fit: what it leaves behind, and how soon it ends."""

from __future__ import annotations

import time

from measuring.record import Recorder
from measuring.runs import PLUGINS, start


def measure(recorder: Recorder) -> None:
    model, rows, length = ("qwen3-tiny", 64, 1024) if recorder.rehearse else ("qwen3-134m", 16, 1024)
    # On a CPU: so much more than the libraries have mapped already.
    limit = 1_500_000_000 if recorder.rehearse else 4_000_000_000
    run = recorder.folder / "run"
    arguments = ["--model", model, "--steps", "3", "--micro-batch", str(rows), "--seq-len", str(length)]
    arguments += ["--save-every", "0", "--plugin", str(PLUGINS / "limit_memory.py")]
    status = start(run, *arguments, environment={"LEANSTATE_MEMORY_LIMIT": str(limit)}).wait()
    ended = time.time()
    pages = sorted((run / "memory").glob("rank*-out-of-memory.md"))
    recorder.set(status=status, pages=len(pages))
    if pages:
        recorder.set(seconds=ended - pages[0].stat().st_mtime)
        for line in pages[0].read_text().splitlines()[2:5]:
            if line.strip():
                recorder.note(line.strip())
