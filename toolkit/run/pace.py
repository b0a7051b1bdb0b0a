"""How long each rank takes for what it does alone, while the others wait for it: which one is slow."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from toolkit.run.moment import Moment

_WARM = 2
"""Steps that are not counted: the first ones allocate, and learn the order of what they meet."""


class Pace:
    """Times forward passes, less the waiting for other ranks in them.

    At ZeRO stages 0, 1 and 2 a rank meets no other one there. At stage 3 weights are gathered, and passes take all
    ranks as long as the slowest, which waits least: the others wait for its part of the weights. On a GPU all of it is
    timed by its own clock, and nothing waits for that.
    """

    def __init__(self, engine: Any, stage: int) -> None:
        self._device = engine.device
        self._passes: list[tuple[Moment, Moment]] = []
        self._waits: list[tuple[Moment, Moment]] = []
        self._began: Moment | None = None
        self._steps: list[float] = []
        engine.module.register_forward_pre_hook(self._before)
        engine.module.register_forward_hook(self._after)
        if stage == 3:
            from toolkit.zero.agreement import watch_gathers

            watch_gathers(engine, self._waiting)

    def _before(self, module: Any, *_: Any) -> None:
        self._began = Moment(self._device) if module.training else None

    def _after(self, *_: Any) -> None:
        if self._began is not None:
            self._passes.append((self._began, Moment(self._device)))
            self._began = None  # what follows, and gathers weights again, is the backward pass

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = Moment(self._device) if self._began is not None else None
        yield
        if began is not None:
            self._waits.append((began, Moment(self._device)))

    def step(self, waited: float) -> Callable[[], None]:
        """The forward passes since the last call are those of one step, which waited so long for its data; what is
        returned counts them, once the step has ended."""
        passes, self._passes = self._passes, []
        waits, self._waits = self._waits, []

        def count() -> None:
            if passes:
                self._steps.append(waited + _seconds(passes) - _seconds(waits))

        return count

    def median(self) -> float | None:
        """Seconds of a step, data included."""
        return statistics.median(self._steps[_WARM:]) if len(self._steps) > _WARM else None


def _seconds(spans: list[tuple[Moment, Moment]]) -> float:
    return sum(began.until(ended) for began, ended in spans)
