"""Milliseconds of an optimizer step of one large tensor, in turn with a copy and other optimizers."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from measuring.ground import timed
from measuring.parts import LAUNCHES, STEPS
from measuring.record import Recorder
from toolkit.bench import step as bench
from toolkit.bench.contenders import Stepper, read_contenders
from toolkit.bench.record import LEAST, Row
from toolkit.bench.shapes import Shapes, even

SIZES = {"134M, ms": 131_072 * 1024, "622M, ms": 151_936 * 4096}
LARGE = "622M, ms"
OURS = "amcs:8bit:bf16+8"
TORCH, FLASH = "torch-adamw:fp32", "flash-adamw:bf16"


def measure(recorder: Recorder) -> None:
    sizes = SIZES if not recorder.rehearse else dict.fromkeys(SIZES, 64 * 1024)
    rows = STEPS if not recorder.rehearse else (bench.COPY, OURS, TORCH)
    contenders = read_contenders(rows[1:])
    left_out: dict[str, str] = {}
    for column, size in sizes.items():
        found = bench.measure(contenders, even(size), recorder.device, LEAST, OURS)
        left_out |= found.left_out
        if column == LARGE:
            compare(recorder, {row.name: row for row in found.rows})
        for row in found.rows:
            cells = {column: 1e3 * row.timed["seconds"].median}
            if column == LARGE:
                share = 100 * row.counted["of_copy"]
                cells |= {"bytes an element": row.counted["bytes_moved"], "of copy, %": share}
            recorder.row("steps", row.name, **cells)
        for note in found.notes:
            recorder.note(f"{column.partition(',')[0]}: {note}")
    for name, reason in left_out.items():
        recorder.note(f"{name}: {reason}.")
    launches(recorder, even(sizes[LARGE]))


def compare(recorder: Recorder, rows: Mapping[str, Row]) -> None:
    """What the goals are about, of the large tensor."""
    seconds = {name: row.timed["seconds"].median for name, row in rows.items()}
    recorder.set(of_copy=100 * rows[OURS].counted["of_copy"], over_torch=seconds[OURS] / seconds[TORCH])
    if FLASH in rows:
        by_byte = {name: seconds[name] / rows[name].counted["bytes_moved"] for name in (OURS, FLASH)}
        recorder.set(over_flash=by_byte[OURS] / by_byte[FLASH])


# ---- launch configurations --------------------------------------------------------------------------------------


def launches(recorder: Recorder, shapes: Shapes) -> None:
    """The step at the launch configuration that is chosen, and at fixed ones: compiled anew for each."""
    [contender] = read_contenders([OURS])
    weights, gradients = (shapes.tensors_like(contender.dtype, recorder.device, scale) for scale in (1.0, 1e-3))
    for row in ("chosen", *LAUNCHES) if not recorder.rehearse else ("chosen", LAUNCHES[0]):
        with fixed(None if row == "chosen" else row):
            stepper = Stepper(contender, shapes, weights, gradients)
            recorder.row("launches", row, ms=1e3 * timed(stepper, recorder.device))
            if recorder.device == "cuda":
                recorder.note(f"{row}: launched as {', '.join(sorted(launched())) or 'nothing that is known'}.")


@contextmanager
def fixed(row: str | None) -> Iterator[None]:
    """Within it steps are compiled anew, at one configuration ("4 block(s), 1 warp(s)") or at the usual choice."""
    from torch._inductor import config

    from toolkit.optim import kernel as step

    forget(step.step_function)
    gc.collect()  # kernels that are gone are not `launched`
    with config.patch(force_disable_caches=True, compile_threads=1), contextlib.ExitStack() as stack:
        if row is not None:
            blocks, warps = (int(words.split()[0]) for words in row.split(", "))
            changed = dataclasses.replace(step.LAUNCH, rows=blocks, warps=(warps, step.LAUNCH.warps[1]))
            stack.enter_context(mock.patch.object(step, "LAUNCH", changed))
        yield
    forget(step.step_function)


def forget(step_function: Any) -> None:
    """Let go of everything that has been compiled."""
    step_function.cache_clear()


def launched() -> set[str]:
    """Launch configurations of the kernels that are alive."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    found = set()
    for thing in gc.get_objects():
        if issubclass(type(thing), CachingAutotuner):  # not isinstance: proxies would load
            found |= {f"{launcher.config}" for launcher in getattr(thing, "launchers", ())}
    return found
