"""The 8B model on one GPU: weights drawn there, two steps, and its peak against the prediction."""

from __future__ import annotations

import time

import torch

from measuring.models import engine_of, filled, random_tokens
from measuring.record import Recorder

SETTINGS = {"model": "qwen3-8b", "seq_len": 2048, "steps": 2}
TOY = {"model": "qwen3-tiny", "seq_len": 64, "steps": 3}  # a trace, which a CPU needs, is of the third step


def measure(recorder: Recorder) -> None:
    from toolkit import memory
    from toolkit.estimate.predict import Case, Estimator
    from toolkit.records.activations import Activations

    name, length, steps = (TOY if recorder.rehearse else SETTINGS).values()
    assert isinstance(name, str) and isinstance(length, int) and isinstance(steps, int)
    if recorder.rehearse:
        memory.count_from_here()
    model = filled(name, recorder.device, activations=Activations(checkpoint=True))
    recorder.note(f"{sum(p.numel() for p in model.parameters()):,} parameters.")
    engine, config = engine_of(model, recorder)
    case = Case(name, config, 1, 1, length, device=recorder.device, activations=Activations(checkpoint=True))
    predicted = Estimator().predict(case).peak
    recorder.set(predicted_gb=predicted / 1e9)
    ledger = memory.watch(
        engine, recorder.folder, "full" if recorder.rehearse else "summary", model=name, seq_len=length
    )
    for _ in range(steps):
        tokens = random_tokens(name, 1, length, engine.device)
        began = time.perf_counter()
        loss = engine(tokens)
        engine.backward(loss)
        if recorder.device == "cuda":
            torch.cuda.synchronize()
        queued = time.perf_counter()
        engine.step()
        recorder.set(host_ms=1e3 * (time.perf_counter() - queued))
        value = float(loss)
        recorder.set(step_ms=1e3 * (time.perf_counter() - began))
    recorder.note(f"Loss of the last step {value:.3f}.")
    ledger.close()
    compare(recorder, predicted)


def compare(recorder: Recorder, predicted: int) -> None:
    """The peak of the steps; what building the engine has held before is not predicted, and only said."""
    from toolkit.records import categories as c
    from toolkit.records.memory import FOLDER, Measurement, measured_name

    found = Measurement.model_validate_json((recorder.folder / FOLDER / measured_name(0)).read_text())
    steps = [phase for phase in found.phases if phase.name != c.INIT]
    peak = max(phase.peak or 0 for phase in steps)
    recorder.set(peak_gb=peak / 1e9, peak_error=100 * abs(predicted / peak - 1))
    if recorder.device == "cuda":
        reserved = torch.cuda.memory_reserved()
        largest = max([phase.resident_set or 0 for phase in steps] + [reserved])
        recorder.set(reserved_over_allocated=largest / peak)
    for phase in found.phases:
        recorder.note(f"Peak in {phase.name}: {(phase.peak or 0) / 1e9:.2f} GB.")
