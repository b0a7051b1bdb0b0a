"""What a step costs the host, and how often it waits for the GPU."""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any
from unittest import mock

import torch

from measuring.models import engine_of, filled, random_tokens
from measuring.record import Recorder

WARM, COUNTED = 3, 5
LENGTH = 64
SIGN = "synchronizing CUDA operation"


def measure(recorder: Recorder) -> None:
    for key, name in (("134m", "qwen3-134m"), ("1_7b", "qwen3-1.7b")):
        shapes(recorder, key, "qwen3-tiny" if recorder.rehearse else name)


def shapes(recorder: Recorder, key: str, name: str) -> None:
    """Steps of the model called `name`; figures go by `key`."""
    model = filled(name, recorder.device)
    engine, _ = engine_of(model, recorder)
    host, whole, waits = [], [], []
    places: Counter[str] = Counter()
    torchs = torch_adamw(model, recorder)
    for number in range(WARM + COUNTED):
        loss = engine(random_tokens(name, 1, LENGTH, engine.device))
        engine.backward(loss)
        wait(recorder)
        with waiting_operations(recorder) as found:
            start = time.perf_counter()
            engine.step()
            returned = time.perf_counter()
        wait(recorder)
        done = time.perf_counter()
        if number >= WARM:
            host.append(1e3 * (returned - start))
            whole.append(1e3 * (done - start))
            waits.append(len(found))
            places.update(found)
    recorder.set(**{f"host_ms_{key}": statistics.median(host), f"whole_ms_{key}": statistics.median(whole)})
    recorder.set(**{f"torch_ms_{key}": torchs})
    if recorder.device == "cuda":
        recorder.set(**{f"syncs_{key}": max(waits)})
        for where, count in places.most_common(5):
            recorder.note(f"{name}: waits {count / COUNTED:g} times a step at {where}.")
    del model, engine, loss
    gc.collect()
    if recorder.device == "cuda":
        torch.cuda.empty_cache()


def torch_adamw(model: torch.nn.Module, recorder: Recorder) -> float:
    """Host time of a step of torch's fused AdamW on tensors like the model's, ms."""
    held = [torch.nn.Parameter(torch.zeros_like(weight)) for weight in model.parameters()]
    for one in held:
        one.grad = torch.zeros_like(one)
    optimizer = torch.optim.AdamW(held, fused=True)
    taken = []
    for _ in range(WARM + COUNTED):
        wait(recorder)
        start = time.perf_counter()
        optimizer.step()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[WARM:])


def wait(recorder: Recorder) -> None:
    if recorder.device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def waiting_operations(recorder: Recorder) -> Iterator[list[str]]:
    """The lines of code that waited for the GPU meanwhile: operations that torch warns of, and calls of `synchronize`.

    torch warns of none in torch.distributed.
    """
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event, torch.accelerator):
            stack.enter_context(mock.patch.object(owner, "synchronize", noted(owner.synchronize, found)))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if recorder.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if recorder.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if SIGN in str(warning.message):
            found.append(place(warning.filename, warning.lineno))


def noted(original: Any, found: list[str]) -> Any:
    """`original`, which writes its caller down."""

    def synchronize(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        found.append(place(caller.f_code.co_filename, caller.f_lineno))
        return original(*args, **kwargs)

    return synchronize


def place(file: str, line: int) -> str:
    return f"{'/'.join(PurePath(file).parts[-3:])}:{line}"
