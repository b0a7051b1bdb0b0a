"""The optimizer step's C++, as Inductor writes it for a CPU: one loop over blocks, in vector registers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from toolkit.optim import AMCSRule, SOAMRule
from toolkit.optim import inductor as of_steps
from toolkit.optim.inductor import Launch, compile_blocks
from toolkit.optim.kernel import StepFunction
from toolkit.optim.rule import Rule
from toolkit.optim.rules.lomo import LOMORule
from toolkit.state.codecs import BLOCK
from toolkit.state.layout import layout, state_formats

CASES: list[tuple[type[Rule], str, str]] = [(AMCSRule, "8bit", "bf16+8"), (SOAMRule, "minimal", "bf16+4")]


class _Written(Exception):
    """Inductor has written its module."""


def write(rule: type[Rule], state_format: str, weights: str) -> str:
    """What Inductor writes for the step, for the vectors of this process."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.graph import GraphLowering

    kept = layout(rule.states, state_formats(rule.states, state_format, where="here"), weights, torch.bfloat16)
    made = rule(total_steps=10) if "total_steps" in rule.model_fields else rule()
    function = StepFunction(rule, tuple(made.scalars(1)), kept)
    theta = torch.zeros(64, BLOCK, dtype=torch.bfloat16)
    inputs = function._inputs(theta, theta.clone(), list(kept.allocate(theta.numel(), theta.device).values()))
    rest: list[Tensor | None] = [torch.zeros(len(made.scalars(1))), torch.ones(())]
    written: list[str] = []

    def stop(code: str) -> None:
        written.append(code)
        raise _Written

    rest.append(function._phase(theta, (0, 1, 0)))
    # With several threads, whatever this process has: with one there is nothing in the code that tells a loop.
    mine = inductor.patch({"fx_graph_cache": False, "cpp.threads": 2}), functorch.patch(enable_autograd_cache=False)
    with mine[0], mine[1], mock.patch.object(GraphLowering, "save_output_code", staticmethod(stop)):
        try:
            compile_blocks(function.eager, inputs, rest, Launch())
        except Exception:
            if not written:  # an error before there was anything to stop
                raise
    [code] = written
    return code


def shortcomings(code: str) -> Iterator[str]:
    """What costs time in the C++ of a step: reading blocks twice, vectors that go by way of memory."""
    if code.count("#pragma omp for") != 1:
        yield "several loops over all blocks"
    if "tmpbuf" in code:
        yield "one number of a vector after the other"
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        if re.search(r"VectorizedN<(float|int32_t|u?int8_t|at::\w+),", code):
            yield "more numbers at a time than a register holds"
        parts = r"Vectorized<(?:u?int8_t|at::\w+)>"
        if re.search(rf"{parts}::loadu|convert<(?:u?int8_t|at::\w+)[,>]|convert<[\w,]+>\({parts}", code):
            yield "parts of registers go by way of memory"
        if "cvtfp32_bf16" in code:
            yield "a bf16 weight is rounded again"
    if "::arange(0, 1)" not in code:
        yield "numbers of lanes are counted up"


def found(case: int) -> str:
    rule, name, kept = CASES[case]
    return f"{rule.__name__} {name}: {list(shortcomings(write(rule, name, kept)))}"


@pytest.mark.parametrize("case", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_step_is_one_loop_in_vector_registers(case: int) -> None:
    good = f"{CASES[case][0].__name__} {CASES[case][1]}: []"
    assert found(case) == good
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return
    # So it is on lesser processors.
    done = subprocess.run(
        [sys.executable, __file__, str(case)],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == good


@pytest.mark.slow
def test_a_value_that_is_written_once_gives_the_same_code() -> None:
    """In halves of blocks, where what is used twice is written the most often."""
    case = (LOMORule, "8bit", "bf16+4")
    [_, *once] = write(*case).splitlines()  # the first line counts the modules of this process
    with mock.patch.object(of_steps, "_each_value_once", nullcontext):
        assert write(*case).splitlines()[1:] == once


if __name__ == "__main__":
    print(found(int(sys.argv[1])))
