"""How long each rank takes for what it does alone, while the others wait for it: which one is slow."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from toolkit.run.moment import Moment

_WARM = 2
"""Steps that are not counted: the first ones allocate, and learn the order of what they meet."""


class Pace:
    """Times forward passes, in which a rank meets no other one at ZeRO stages 0, 1 and 2.

    On a GPU by its own clock, and nothing waits for it. At stage 3 weights are gathered in them, which takes all ranks
    as long as the slowest: nothing is timed there.
    """

    def __init__(self, engine: Any, stage: int) -> None:
        self._device = engine.device
        self._passes: list[tuple[Moment, Moment]] = []
        self._began: Moment | None = None
        self._steps: list[float] = []
        if stage < 3:
            engine.module.register_forward_pre_hook(self._before)
            engine.module.register_forward_hook(self._after)

    def _before(self, module: Any, *_: Any) -> None:
        self._began = Moment(self._device) if module.training else None

    def _after(self, *_: Any) -> None:
        if self._began is not None:
            self._passes.append((self._began, Moment(self._device)))

    def step(self, waited: float) -> Callable[[], None]:
        """The forward passes since the last call are those of one step, which waited so long for its data; what is
        returned counts them, once the step has ended."""
        passes, self._passes = self._passes, []

        def count() -> None:
            if passes:
                self._steps.append(waited + sum(began.until(ended) for began, ended in passes))

        return count

    def median(self) -> float | None:
        """Seconds of a step, data included."""
        return statistics.median(self._steps[_WARM:]) if len(self._steps) > _WARM else None
