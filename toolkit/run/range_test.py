"""`--lr auto`: the learning rate that a range test finds before a run begins.

The range test is that of L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186, section
3.3): steps on the run's own data, with a rate that grows from step to step until the loss rises. Here it grows
exponentially, and the rate that is taken is the one at which the smoothed loss falls fastest per step, which is below
the rates with the least loss and with divergence.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UserError
from toolkit.records.sizes import counted
from toolkit.run import compiling, ranks
from toolkit.run.engine import build_engine, open_batches, optimizer_step
from toolkit.run.prepare import PreparedRun
from toolkit.run.saving import random_states, restore_random_states

LOWEST, HIGHEST = 1e-6, 10.0
STEPS = 112
"""Sixteen steps while the rate grows tenfold."""
_WINDOW, _WIDTH = 8, 4.0
"""Steps that are averaged: those before one, to see the loss rise, and around one, to see how fast it falls."""
_FALL, _RISE = 0.02, 0.1
"""Of the first loss, what counts as a fall; of the fall, what counts as a rise after it."""
_QUIET = ("scheduler", "flops_profiler")
"""Sections of the JSON that a test does without: it sets the rates itself, and is no part of the run's records."""


@dataclass(frozen=True)
class Found:
    """The rate that a test chose, and what it saw: the mean loss of all ranks at each rate, in order."""

    lr: float
    rates: list[float]
    losses: list[float]
    seconds: float

    def words(self) -> str:
        return (
            f"--lr auto: {self.lr:.2e}, found in {self.seconds:.1f} s by {counted(len(self.rates), 'step')} with "
            f"rates from {self.rates[0]:.0e} to {self.rates[-1]:.1e}; the run begins anew with it"
        )

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {"lr": self.lr, "seconds": round(self.seconds, 3), "rates": self.rates, "losses": self.losses}


def find_rate(prepared: PreparedRun, background: compiling.Background | None, say: Callable[[str], None]) -> Found:
    """Test rates on an engine of its own; every rank must call this, and all get the same.

    Nothing of the test stays: model, optimizer and data are built again for the run, and random states are put back.
    """
    import torch

    began = time.perf_counter()
    say(f"--lr auto: testing up to {STEPS} rates from {LOWEST:g} on, a step each")
    states = random_states()
    torch.manual_seed(prepared.settings.seed)
    engine = build_engine(prepared, {key: part for key, part in prepared.config.items() if key not in _QUIET})
    compiling.step_compiled(engine, background, say)
    batches = open_batches(prepared, copy.copy(prepared.data), None)
    rates: list[float] = []
    losses: list[float] = []
    try:
        for rate in _rates():
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            mine = optimizer_step(engine, batches, prepared.batch.accumulation)
            [loss], _ = ranks.mean_max([mine], [], engine.device)
            if not math.isfinite(loss):
                break
            rates.append(rate)
            losses.append(loss)
            if risen(losses):
                break
    finally:
        batches.close()
        engine.destroy()
        del engine
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    restore_random_states(states)
    return ranks.from_first(Found(steepest(rates, losses), rates, losses, time.perf_counter() - began))


def _rates() -> list[float]:
    return [LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)) for step in range(STEPS)]


def risen(losses: Sequence[float]) -> bool:
    """Whether the loss, a mean of the last steps, is on its way up: after a fall by a tenth of that, or by half."""
    means = [statistics.fmean(losses[end - _WINDOW : end]) for end in range(_WINDOW, len(losses) + 1)]
    if not means:
        return False
    first, lowest, last = means[0], min(means), means[-1]
    fell = first - lowest > _FALL * first
    return last > (lowest + _RISE * (first - lowest) if fell else 1.5 * first)


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which the smoothed loss falls fastest, before it is least; with two digits, as it can be typed.

    Raises:
        UserError: the loss does not fall.
    """
    smooth = [_around(losses, place) for place in range(len(losses))]
    least = min(range(len(smooth)), key=smooth.__getitem__) if smooth else 0
    if not smooth or smooth[0] - smooth[least] <= _FALL * smooth[0]:
        raise UserError(f"--lr auto: the loss falls at no rate from {LOWEST:g} to {HIGHEST:g}; give --lr a number.")
    inner = range(1, max(2, least))
    return float(f"{rates[min(inner, key=lambda place: smooth[place + 1] - smooth[place - 1])]:.1e}")


def _around(losses: Sequence[float], place: int) -> float:
    """The mean of the losses around `place`, weighted by a bell curve."""
    weights = [math.exp(-0.5 * ((place - other) / _WIDTH) ** 2) for other in range(len(losses))]
    return math.fsum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / math.fsum(weights)
