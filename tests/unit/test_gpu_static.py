"""The optimizer step's GPU code, proven without a GPU: what Inductor writes and Triton makes of it, and its numbers."""

from __future__ import annotations

import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

from absent_gpu import Source, machine_code, write  # noqa: E402
from gpu_static import Case, shipped  # noqa: E402

from toolkit.optim import RULES, AMCSRule, SOAMRule  # noqa: E402
from toolkit.optim.inductor import Launch  # noqa: E402
from toolkit.optim.rules.amcs import AMCSSingleRule  # noqa: E402
from toolkit.state.codecs import BLOCK  # noqa: E402

FEW = [Case(AMCSRule, "8bit", "bf16+8"), Case(AMCSRule, "compact", "bf16+4"), Case(AMCSRule, "lean", "bf16")]
"""What most runs have, with codes of 8 and of 4 bits and without remainders; the whole product takes minutes."""

OTHERS = [Case(AMCSSingleRule, "4bit", "fp32"), Case(SOAMRule, "minimal", "bf16"), Case(SOAMRule, "fp32", "bf16+16")]
"""With FEW, every rule, format and way of keeping weights at least once."""

MOST = {FEW[0]: 120, Case(RULES["AdamW8"].rule, "8bit", "bf16+8"): 95}
"""Instructions an element that a step takes at most, at the launch configuration that is chosen."""

written = functools.cache(lambda case: write(case.rule, case.layout, case.dtype, Launch()))


def check(case: Case) -> None:
    source: Source = written(case)
    [kernel] = source.kernels
    assert source.intermediates == 0
    scaled = any(codec.scaled for codec in case.layout.codecs)
    chosen = Launch()
    block, warps = (chosen.rows, chosen.warps[0]) if scaled else (chosen.elements, chosen.warps[1])
    assert (kernel.launch["XBLOCK"], kernel.launch["num_warps"]) == (block, warps)
    # 32-bit indices: StepFunction sees to it that no call needs more.
    assert kernel.signature["xnumel"] == "i32" and "tl.int64" not in kernel.text.split("tmp0 =")[0]
    names = list(kernel.signature)
    for number, name in enumerate(kernel.arguments):
        if name.startswith("arg"):
            is_scale = name in scales(case)
            assert (number in kernel.aligned) != is_scale, f"{names[number]}: a scale may begin at any address"
    code = machine_code(kernel)
    assert code.spilled == code.stack == 0
    assert code.registers <= 128, "a quarter of the warps that a multiprocessor can hold"
    if case in MOST:
        elements = block * (BLOCK if scaled else 1) / (32 * warps)
        assert code.opcodes.total() / elements <= MOST[case]


def scales(case: Case) -> set[str]:
    """The step's flat arguments that are scales, by the names that Inductor gives arguments."""
    from absent_gpu import step_arguments

    _, inputs, _ = step_arguments(case.rule, case.layout, case.dtype, 4, "cpu")
    flat = [x for halves in inputs for x in halves]
    return {f"arg{number}_1" for number, x in enumerate(flat) if x.shape[1] == 1}


@pytest.mark.parametrize(
    "case",
    [FEW[0], *(pytest.param(case, marks=pytest.mark.slow) for case in dict.fromkeys((*MOST, *FEW)) if case != FEW[0])],
    ids=str,
)
def test_a_step_is_one_kernel_without_intermediates_and_spills(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(shipped()), ids=str)
def test_so_is_every_step_that_is_shipped(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    ("name", "function", "state_format", "kernels"),
    [
        ("StableAdamW", "measure", "8bit", 1),
        pytest.param("StableAdamW", "update", "8bit", 1, marks=pytest.mark.slow),
        pytest.param("StableAdamW", "measure", "minimal", 1, marks=pytest.mark.slow),
        pytest.param("Adafactor8", "measure_step", "8bit", 1, marks=pytest.mark.slow),
        pytest.param("Adafactor8", "update", "8bit", 1, marks=pytest.mark.slow),
        pytest.param("Muon8", "direction", "8bit", 1, marks=pytest.mark.slow),
        # What has no tensor in common is no slower apart: theta^2 and g^2, weights (from o) and m.
        pytest.param("Adafactor8", "measure", "8bit", 2, marks=pytest.mark.slow),
        pytest.param("Muon8", "update", "8bit", 2, marks=pytest.mark.slow),
    ],
)
def test_a_pass_over_whole_parameters_is_one_kernel(name: str, function: str, state_format: str, kernels: int) -> None:
    """A measuring and an updating kernel, and nothing of full size between them."""
    case = Case(RULES[name].rule, state_format, "bf16+8")
    source = write(case.rule, case.layout, case.dtype, Launch(), function)
    assert len(source.kernels) == kernels and source.intermediates == 0
    for code in map(machine_code, source.kernels):
        assert code.spilled == code.stack == 0 and code.registers <= 128


@pytest.mark.parametrize(
    "cases", [FEW[:1], pytest.param(FEW[1:] + OTHERS, marks=pytest.mark.slow)], ids=["one", "others"]
)
def test_the_kernel_gives_the_eager_numbers(cases: list[Case], tmp_path: Path) -> None:
    """In Triton's interpreter: the same codes and weights."""
    file = tmp_path / "cases.pickle"
    written_cases = [(case.rule, case.layout, case.dtype, written(case).kernels[0]) for case in cases]
    file.write_bytes(pickle.dumps(written_cases))
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_static_interpreted.py", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        for name, differ in json.loads(line).items():
            assert differ == 0, f"{case} {name}: {differ} values differ"
