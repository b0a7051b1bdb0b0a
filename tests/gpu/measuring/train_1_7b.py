"""The 1.7B model with activation checkpointing."""

from __future__ import annotations

from measuring.record import Recorder
from measuring.runs import finished, peaks, speed, start


def measure(recorder: Recorder) -> None:
    model, rows, length = ("qwen3-tiny", 2, 64) if recorder.rehearse else ("qwen3-1.7b", 4, 2048)
    tokenizer = "python-4k" if recorder.rehearse else "mistral-32k"  # the model's own would be fetched
    run = recorder.folder / "run"
    arguments = ["--model", model, "--tokenizer", tokenizer, "--steps", "6", "--micro-batch", str(rows)]
    arguments += ["--seq-len", str(length), "--activations", "checkpoint", "--save-every", "0"]
    # A CPU knows its peak from a trace only.
    arguments += ["--memory-profile", "full" if recorder.rehearse else "summary"]
    finished(start(run, *arguments))
    speed(recorder, run, model, length, rows)
    peaks(recorder, run)
