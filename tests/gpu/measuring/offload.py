"""Weights, state and the step on the host: gradients held there until the step, and released to it."""

from __future__ import annotations

from pathlib import Path

from measuring.record import Recorder
from measuring.runs import finished, metrics, peaks, speed, start

LEAN = ("--set", "optimizer.params.state_format=lean", "--set", "optimizer.params.weights=bf16")


def measure(recorder: Recorder) -> None:
    held, slow = run(recorder, "held", "amcs_zero3_offload", *LEAN)
    released, fast = run(recorder, "released", "amcs_zero3_offload_lean")
    recorder.set(held_ms=1e3 * slow, released_over_held=fast / slow)
    one, other = ([record["loss"] for record in metrics(folder)] for folder in (held, released))
    recorder.set(losses_differ=sum(x != y for x, y in zip(one, other, strict=True)))
    peaks(recorder, released)


def run(recorder: Recorder, name: str, config: str, *arguments: str) -> tuple[Path, float]:
    """The folder of a run, and the seconds of its median step.

    Without clipping, which knows a norm sooner or later, and with the same bits each time.
    """
    folder = recorder.folder / name
    model, rows, length = ("qwen3-tiny", 2, 64) if recorder.rehearse else ("qwen3-134m", 4, 1024)
    settings = ["--config", config, *arguments, "--set", "gradient_clipping=0.0", "--deterministic"]
    settings += ["--model", model, "--steps", "8", "--micro-batch", str(rows), "--seq-len", str(length)]
    settings += ["--save-every", "0", "--memory-profile", "full" if recorder.rehearse else "summary"]
    finished(start(folder, *settings))
    return folder, speed(recorder, folder, model, length, rows)
