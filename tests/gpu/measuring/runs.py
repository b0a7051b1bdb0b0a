"""Training runs of the product itself, and what their folders say."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring.record import REPOSITORY, Recorder

PLUGINS = Path(__file__).resolve().parent / "plugins"
COMMON = ("--config", "amcs_zero2", "--data", "stdlib", "--eval-every", "0")
DENSE_BF16 = {"H100": 989e12, "H200": 989e12}
"""Operations a second, dense, by NVIDIA's data sheets of the SXM parts."""

SETTLED = 3
"""Steps from which on the median is taken: the first compile, and a full profile traces the third."""


def start(
    folder: Path, *arguments: str, launcher: bool = False, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a run into `folder`; with `launcher` through DeepSpeed's, else as a process alone."""
    port = str(free_port())
    module = [sys.executable, "-m"]
    if launcher:
        command = [*module, "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port, "launch/train.py"]
    else:
        command = [*module, "toolkit.train"]
    command += [*COMMON, "--run-dir", str(folder), *arguments]
    print("$", " ".join(command), flush=True)
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"MASTER_PORT": port} | dict(environment or {}))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def finished(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that must succeed."""
    if status := process.wait():
        raise RuntimeError(f"the run ended with status {status}")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of its steps."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def operations_per_token(model: str, seq_len: int) -> float:
    """Floating point operations of forward and backward pass that a token needs, without what is computed again.

    6 for each parameter of a matrix product (an input embedding is looked up, not multiplied), and for causal attention
    6 x layers x width of all heads x length: two products forward, twice as many backward, half of them masked.
    """
    from toolkit.models import count_parameters, load_config

    config = load_config(model)[0]
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 6.0 * (count_parameters(config) - looked_up) + 6.0 * attention


def speed(recorder: Recorder, folder: Path, model: str, seq_len: int, sequences: int) -> float:
    """Keep tokens a second, milliseconds and MFU; returns the seconds of the median step."""
    import torch

    records = metrics(folder)
    settled = [record["step_time_s"] for record in records if record["step"] > SETTLED]
    seconds = statistics.median(settled)
    rate = sequences * seq_len / seconds
    recorder.set(tokens_per_s=rate, step_ms=1e3 * seconds)
    first, last = records[0], records[-1]
    recorder.note(
        f"{len(records)} steps, the median is of {len(settled)}; the first took {first['step_time_s']:.1f} s. Loss "
        f"{first['loss']:.3f} in the first step, {last['loss']:.3f} in the last."
    )
    name = torch.cuda.get_device_name(0) if recorder.device == "cuda" else "cpu"
    peak = next((value for key, value in DENSE_BF16.items() if key in name), None)
    if peak is not None:
        recorder.set(mfu=100 * rate * operations_per_token(model, seq_len) / peak)
    else:
        recorder.note(f"MFU: the rate of {name!r} is not known here.")
    return seconds


def peaks(recorder: Recorder, folder: Path) -> None:
    """Keep the peak that was measured and the one that was predicted before."""
    from toolkit.records.memory import FOLDER, PREDICTED, Measurement, Prediction, measured_name

    predicted = Prediction.model_validate_json((folder / FOLDER / PREDICTED).read_text())
    found = Measurement.model_validate_json((folder / FOLDER / measured_name(0)).read_text())
    recorder.set(predicted_gb=predicted.peak / 1e9)
    phases = {phase.name: phase for phase in predicted.phases}
    for phase in found.phases:
        expected = phases[phase.name].peak if phase.name in phases else None
        recorder.note(
            f"Peak in {phase.name}: {gigabytes(phase.peak)}, predicted {gigabytes(expected)}; largest: "
            f"{largest(phase.held)}."
        )
    if found.peak is not None:
        recorder.set(peak_gb=found.peak / 1e9, peak_error=100 * abs(predicted.peak / found.peak - 1))
    if found.allocator is not None:
        reserved, allocated = gigabytes(found.allocator.reserved), gigabytes(found.allocator.allocated)
        recorder.note(f"At the end {reserved} reserved, {allocated} of it allocated.")


def gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.3f} GB"


def largest(held: Mapping[str, int]) -> str:
    """The three largest categories, and what has no name."""
    names: Sequence[str] = sorted(held, key=lambda name: -held[name])[:3]
    chosen = dict.fromkeys([*names, *(name for name in ("other",) if name in held)])
    return ", ".join(f"{name} {gigabytes(held[name])}" for name in chosen) or "not traced"
