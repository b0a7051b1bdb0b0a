"""`--lr auto`: the learning rate that a range test finds before a run begins.

The range test is that of L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186, section
3.3): the run's own first steps, with a rate that grows from step to step until the loss rises. Here it grows
exponentially.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.run import compiling, ranks
from toolkit.run.engine import build_engine, open_batches, optimizer_step
from toolkit.run.prepare import PreparedRun
from toolkit.run.saving import random_states, restore_random_states

LOWEST, HIGHEST = 1e-6, 10.0
STEPS = 112
"""Sixteen steps while the rate grows tenfold."""
_QUIET = ("scheduler", "tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler")
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
            f"--lr auto: {self.lr:.2e}, found in {self.seconds:.1f} s by {len(self.rates)} steps with rates from "
            f"{self.rates[0]:.0e} to {self.rates[-1]:.1e}; the run begins anew with it"
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
            if _diverged(losses):
                break
    finally:
        batches.close()
        engine.destroy()
        del engine
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    restore_random_states(states)
    return ranks.from_first(Found(chosen(rates, losses), rates, losses, time.perf_counter() - began))


def _rates() -> list[float]:
    return [LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)) for step in range(STEPS)]


def _diverged(losses: Sequence[float]) -> bool:
    return False


def chosen(rates: Sequence[float], losses: Sequence[float]) -> float:
    return 1e-3
