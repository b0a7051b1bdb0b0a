"""Milliseconds of an optimizer step of one large tensor, beside a copy and other optimizers."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from measuring.ground import timed
from measuring.parts import LAUNCHES, STEPS
from measuring.record import Recorder

SIZES = {"134M, ms": (131_072, 1024), "622M, ms": (151_936, 4096)}
LARGE = "622M, ms"
OURS = "AMCS 8bit, bf16+8"
COPY = STEPS[0]

Make = Callable[[nn.Parameter], torch.optim.Optimizer]


def measure(recorder: Recorder) -> None:
    sizes = SIZES if not recorder.rehearse else dict.fromkeys(SIZES, (64, 1024))
    rows = STEPS if not recorder.rehearse else (COPY, OURS, "torch AdamW fused, bf16 weights and state")
    makers = {name: contender(name) for name in rows if name != COPY}
    moved = bytes_moved(OURS)
    bandwidth = 0.0
    for column, shape in sizes.items():
        numel = shape[0] * shape[1]
        source = torch.ones(int(numel * moved / 2), dtype=torch.uint8, device=recorder.device)
        target = torch.empty_like(source)
        seconds = timed(lambda source=source, target=target: target.copy_(source), recorder.device)  # type: ignore[misc]
        bandwidth = 2 * source.nbytes / seconds
        cells = {column: 1e3 * seconds, "bytes an element": moved, "of copy, %": 100.0}
        recorder.row("steps", COPY, **cells)
        del source, target
        for name, make in makers.items():
            if make is None:
                continue
            try:
                seconds = step_seconds(make, name, shape, recorder)
            except Exception as error:  # another project's package that does not work here is no failure of ours
                if name.startswith(("AMCS", "SOAM")):
                    raise
                recorder.note(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
                continue
            cells = {column: 1e3 * seconds}
            if column == LARGE:
                share = 100 * bytes_moved(name) * numel / seconds / bandwidth
                cells |= {"bytes an element": bytes_moved(name), "of copy, %": share}
                if name == OURS:
                    recorder.set(of_copy=share)
            recorder.row("steps", name, **cells)
    for name in (name for name, make in makers.items() if make is None):
        recorder.note(f"{name}: the package is not installed.")
    launches(recorder, sizes[LARGE])


def contender(name: str) -> Make | None:
    """What makes the optimizer called `name`; None where its package is missing."""
    from toolkit.optim import AMCS, SOAM

    if name.startswith("torch"):
        return lambda p: torch.optim.AdamW([p], lr=1e-3, fused=True)
    if name.startswith("bitsandbytes"):
        try:
            import bitsandbytes as bnb
        except ImportError:
            return None
        return lambda p: bnb.optim.AdamW8bit([p], lr=1e-3)
    if name.startswith("Flash"):
        try:
            from flashoptim import FlashAdamW
        except ImportError:
            return None
        return lambda p: FlashAdamW([p], lr=1e-3, master_weight_bits=24)
    rule, state_format, weights = name.replace(",", "").replace(" weights", "").split()
    if rule == "SOAM":
        return lambda p: SOAM([p], state_format=state_format, weights=weights)
    return lambda p: AMCS([p], total_steps=1000, state_format=state_format, weights=weights)


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if "fp32 weights" in name else torch.bfloat16


def bytes_moved(name: str) -> float:
    """That a step must move, an element: weights and state read and written, the gradient read."""
    from toolkit.optim import find_rule
    from toolkit.state.layout import layout, state_formats

    itemsize = dtype_of(name).itemsize
    if name.startswith("torch"):
        held = 2.0 * itemsize
    elif name.startswith("bitsandbytes"):
        held = 2 + 2 * 4 / 256
    elif name.startswith("Flash"):
        held = 3.125  # two states of 8 bits, fp16 scales of 32 elements, 8 bits of the weight
    else:
        rule_name, state_format, weights = name.replace(",", "").replace(" weights", "").split()
        rule = find_rule(rule_name)
        assert rule is not None
        formats = state_formats(rule.rule.states, state_format, where=name)
        held = sum(layout(rule.rule.states, formats, weights, dtype_of(name)).bytes_per_element().values())
    return 3 * itemsize + 2 * held


def step_seconds(make: Make, name: str, shape: tuple[int, int], recorder: Recorder) -> float:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, device=recorder.device, dtype=dtype_of(name)))
    parameter.grad = torch.randn_like(parameter).mul_(1e-3)
    optimizer = make(parameter)
    seconds = timed(optimizer.step, recorder.device)
    reason = fallback(optimizer, parameter)
    if reason is not None:
        recorder.note(f"{name}: not compiled, because {reason}")
    return seconds


def fallback(optimizer: Any, parameter: nn.Parameter) -> str | None:
    """Why the compiler was not used, where it is one of ours and was not."""
    if not hasattr(optimizer, "begin"):
        return None
    begun = optimizer.begin(optimizer.param_groups[0], parameter)
    return begun.function.fallback_reason if begun is not None else None


# ---- launch configurations --------------------------------------------------------------------------------------


def launches(recorder: Recorder, shape: tuple[int, int]) -> None:
    """The step at the launch configuration that is chosen, and at fixed ones: compiled anew for each."""
    make = contender(OURS)
    assert make is not None
    for row in ("chosen", *LAUNCHES) if not recorder.rehearse else ("chosen", LAUNCHES[0]):
        with fixed(None if row == "chosen" else row):
            recorder.row("launches", row, ms=1e3 * step_seconds(make, OURS, shape, recorder))
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
