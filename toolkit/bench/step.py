"""How long an optimizer step takes: each optimizer in its turn, on the same tensors, beside a copy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from toolkit.bench.contenders import Contender, Stepper
from toolkit.bench.record import Row, Spread, ratios
from toolkit.bench.shapes import Shapes, count_text, even, smallest
from toolkit.bench.timing import copy_call, in_turn
from toolkit.errors import UserError
from toolkit.records.sizes import counted, size_text

COPY = "copy"
"""The row of a copy that moves as many bytes as the baseline must."""

_GRADIENTS = 1e-3
_SPARE = 1.25
"""Memory that a size wants, for each byte of its tensors: what a step holds for a moment comes on top."""

Say = Callable[[str], None]


@dataclass
class Measured:
    """Rows, what was left out and why, and what else there is to say."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Keep = Callable[[Measured], None]
"""Called with all that was found so far, whenever there is more: a benchmark that is cut short loses nothing."""


def measure(
    contenders: Sequence[Contender],
    shapes: Shapes,
    device: str,
    repeats: int,
    baseline: str | None = None,
    *,
    at: dict[str, int] | None = None,
    say: Say = lambda words: None,
) -> Measured:
    """Time a step of each of `contenders` on tensors of `shapes`, and the share of it that is the host's.

    On a GPU the host's share is how long it takes to queue the step. On a CPU it is the step of as many tensors of two
    blocks each: a kernel for them takes no time that counts.

    Raises:
        UserError: an option of one of this package's optimizers is wrong, or `baseline` was not measured.
    """
    found = Measured()
    names = [contender.name for contender in contenders]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline {baseline} is none of --optimizers {', '.join(names)}.")
    with _fallbacks(found.notes):
        steppers = _steppers(contenders, shapes, device, found.left_out, say)
        base = baseline or next((name for name in steppers), None)
        if base is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in found.left_out.items())
            raise UserError(f"none of --optimizers can run here ({reasons}).")
        if base not in steppers:
            raise UserError(f"--baseline {base} is not measured: {found.left_out[base]}.")
        moved = {name: stepper.bytes_moved() for name, stepper in steppers.items()}
        copy, copied = copy_call(round(moved[base] * shapes.parameters), device)
        size = f"{count_text(shapes.parameters)} parameters in {counted(shapes.tensors, 'tensor')}"
        say(f"{counted(len(steppers), 'optimizer')} on {size}, {counted(repeats, 'round')}")
        taken = in_turn({COPY: copy, **steppers}, device, repeats, lambda left: say(f"about {left:.0f} s for them"))
        done = {name: [one.done for one in samples] for name, samples in taken.items()}
        hosts = {name: [one.host for one in samples] for name, samples in taken.items()}
        if device == "cpu":
            tiny = smallest(shapes)
            running = [one for one in contenders if one.name in steppers]
            small = _steppers(running, tiny, device, found.left_out, lambda words: None)
            hosts = {name: [one.done for one in samples] for name, samples in in_turn(small, device, repeats).items()}
    against = ratios(done, base)
    bandwidth = copied / Spread.of(done[COPY]).median
    for name, times in done.items():
        timed = {"seconds": Spread.of(times)}
        if name in hosts and name != COPY:
            timed["host_seconds"] = Spread.of(hosts[name])
        width = copied / shapes.parameters if name == COPY else moved[name]
        counts = {
            "bytes_moved": width,
            "of_copy": width * shapes.parameters / timed["seconds"].median / bandwidth,
            "ratio": against[name].median,
        }
        if name != COPY:
            counts["state_bytes"] = steppers[name].state_bytes()
        found.rows.append(Row(name=name, at=at or {}, timed=timed, counted=counts))
    return found


def _steppers(
    contenders: Sequence[Contender], shapes: Shapes, device: str, left_out: dict[str, str], say: Say
) -> dict[str, Stepper]:
    """Those of `contenders` that can make a step here, after their first one; the others go to `left_out`."""
    tensors: dict[torch.dtype, Any] = {}
    found: dict[str, Stepper] = {}
    for number, contender in enumerate(contenders, 1):
        reason = contender.missing(device)
        if reason is not None:
            left_out[contender.name] = reason
            continue
        if contender.dtype not in tensors:
            tensors[contender.dtype] = tuple(
                shapes.tensors_like(contender.dtype, device, scale) for scale in (1.0, _GRADIENTS)
            )
        weights, gradients = tensors[contender.dtype]
        say(f"first step of {contender.name} ({number} of {len(contenders)})")
        try:
            stepper = Stepper(contender, shapes, weights, gradients)
            stepper()
        except UserError as error:
            raise UserError(f"--optimizers {contender.name}: {error}") from None
        except Exception as error:  # another project's package that does not work here is a result, and said
            if contender.ours:
                raise
            lines = str(error).strip().splitlines() or [""]
            left_out[contender.name] = f"its first step failed ({type(error).__name__}: {lines[0]})"
            continue
        found[contender.name] = stepper
    return found


@contextmanager
def _fallbacks(notes: list[str]) -> Iterator[None]:
    """Within it, what this package warns of (a step that could not be compiled) goes into `notes`, too."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "compiling the optimizer step" not in (words := record.getMessage()):  # that only asks for patience
                notes.append(words)

    handler = Keep(logging.WARNING)
    logger = logging.getLogger("toolkit")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# ---- growth -------------------------------------------------------------------------------------------------------

SIZES = (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8, 10**9)
TENSORS = (10, 40, 160, 640, 2560, 10_240)
SPREAD_OVER = 10_240 * 1024
"""Parameters that are cut into ever more tensors, which divide them evenly."""


def growth(
    contenders: Sequence[Contender],
    largest: int,
    device: str,
    repeats: int,
    baseline: str | None,
    *,
    say: Say,
    keep: Keep = lambda found: None,
) -> Measured:
    """Time steps of one tensor of ever more parameters, up to `largest`, and of ever more tensors of `SPREAD_OVER`.

    A size that this machine has no memory for is left out with all larger ones, which is said.
    """
    found = Measured()
    sizes = [size for size in SIZES if size < largest] + [largest]
    spread = min(SPREAD_OVER, largest)
    plan = [even(size) for size in sizes] + [even(spread, count) for count in TENSORS if count <= spread]
    held = 0.0
    for shapes in plan:
        at = {"parameters": shapes.parameters, "tensors": shapes.tensors}  # as they are, not as they were asked for
        where = f"{count_text(at['parameters'])} parameters in {counted(at['tensors'], 'tensor')}"
        free = free_memory(device)
        needed = held * shapes.parameters * _SPARE
        if needed > free:
            told = f"it needs {size_text(needed)}, and {size_text(free)} are free"
            found.notes.append(f"{where}: left out, since {told}.")
            continue
        one = measure(contenders, shapes, device, repeats, baseline, at=at, say=say)
        found.rows += one.rows
        found.left_out |= one.left_out
        found.notes += [note for note in one.notes if note not in found.notes]
        held = held or _held(contenders, one.rows)
        keep(found)
    return found


def _held(contenders: Sequence[Contender], rows: Sequence[Row]) -> float:
    """Bytes a parameter of all tensors together: weights and gradients of each type, and state."""
    kinds = {one.dtype for one in contenders}
    state = sum(row.counted.get("state_bytes", 0.0) for row in rows)
    return sum(2.0 * kind.itemsize for kind in kinds) + state


def free_memory(device: str) -> int:
    """Bytes that new tensors can take."""
    from toolkit.memory.machine import unused

    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else unused()
