"""Another launch configuration of the optimizer step, to time it on a GPU.

    with launch(xblock=4, num_warps=4):
        optimizer = AMCS(...)
        optimizer.step()

The chosen one is `toolkit.optim.inductor.Launch`; what each costs is counted in `docs/benchmarks/gpu-static.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from toolkit.optim import step
from toolkit.optim.inductor import Launch


@contextmanager
def launch(*, xblock: int, num_warps: int) -> Iterator[None]:
    """Steps begun within run their kernel like this: compiled anew, for every optimizer of the process.

    Args:
        xblock: to a program, blocks of 256 elements where blocks have scales (8 bits and less), else elements; a power
            of two. With torch 2.11 a block alone (1) does not compile, and the step runs eagerly.
        num_warps: to a program, of 32 threads.
    """
    chosen = Launch(rows=xblock, elements=xblock, warps=(num_warps, num_warps))
    with mock.patch.object(step, "LAUNCH", chosen):
        step.step_function.cache_clear()
        try:
            yield
        finally:
            step.step_function.cache_clear()
