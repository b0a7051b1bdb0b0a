"""The 134M model through the `deepspeed` launcher, fully profiled."""

from __future__ import annotations

import json

from measuring.record import Recorder
from measuring.runs import PLUGINS, finished, metrics, peaks, speed, start


def measure(recorder: Recorder) -> None:
    model, steps, rows, length = ("qwen3-tiny", 5, 2, 64) if recorder.rehearse else ("qwen3-134m", 30, 16, 1024)
    run, times = recorder.folder / "run", recorder.folder / "times.json"
    arguments = ["--model", model, "--steps", str(steps), "--micro-batch", str(rows), "--seq-len", str(length)]
    arguments += ["--memory-profile", "full", "--save-every", "0", "--plugin", str(PLUGINS / "step_times.py")]
    finished(start(run, *arguments, launcher=True, environment={"LEANSTATE_STEP_TIMES": str(times)}))
    seconds = speed(recorder, run, model, length, rows)
    first = metrics(run)[0]
    recorder.set(compile_s=first.get("compile_s", 0.0))
    peaks(recorder, run)
    taken = sorted(json.loads(times.read_text()))
    recorder.set(optimizer_share=100 * taken[len(taken) // 2] / seconds)
    recorder.note(f"The optimizer's step takes {1e3 * taken[len(taken) // 2]:.2f} ms, median of {len(taken)}.")
