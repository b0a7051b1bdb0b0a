"""Run kernels that Inductor wrote for a GPU in Triton's interpreter, and set them against the eager step.

    TRITON_INTERPRET=1 ATEN_CPU_CAPABILITY=default python tests/benchmarks/gpu_static_interpreted.py CASES.pickle

CASES.pickle holds a list of (rule, layout, weights' dtype, kernel). Prints one JSON line for each: by stored tensor the
number of values that differ. torch's eager square roots may be off in the last place (vector code, which "default"
turns off, and MKL on processors that are not Intel's), and codes with them: here they are exact.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
from pathlib import Path

import torch
from absent_gpu import IMPORTS, Kernel, load, step_arguments
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit.optim.rule import Rule
from toolkit.state.layout import Layout

ROWS = 6


def exact_root(x: Tensor) -> Tensor:
    """The square root, rounded once."""
    return x.double().__pow__(0.5).to(x.dtype)


torch.sqrt = Tensor.sqrt = exact_root

# Triton's interpreter has no functions of the device's library.
_SHIM = (
    "@triton.jit",
    "def _floor(x):",
    "    return tl.floor(x)",
    "@triton.jit",
    "def _trunc(x):",
    "    return tl.where(x < 0, tl.ceil(x), tl.floor(x))",
    "@triton.jit",
    "def _copysign(x, y):",
    "    return tl.where(y < 0, -tl.abs(x), tl.abs(x))",
    "@triton.jit",
    "def _quotient(x, y):",
    "    return x / y",
    "class libdevice:",
    "    floor, trunc, copysign, fast_dividef = _floor, _trunc, _copysign, _quotient",
    "",
)


def compare(rule: type[Rule], kept: Layout, dtype: torch.dtype, kernel: Kernel, folder: Path) -> dict[str, int]:
    """Two steps eagerly, the third both ways."""
    generator = torch.Generator().manual_seed(0)
    function, inputs, rest = step_arguments(rule, kept, dtype, ROWS, "cpu")
    made = rule(total_steps=10) if "total_steps" in rule.model_fields else rule()
    _, others, _ = step_arguments(rule, kept, dtype, ROWS, "cpu")
    for x in inputs[0]:
        x.copy_(torch.randn(x.shape, generator=generator))
    for step in (1, 2, 3):
        for x in inputs[1]:
            x.copy_(torch.randn(x.shape, generator=generator) ** 3 * 1e-2)
        rest[0] = torch.tensor(list(made.scalars(step).values()))
        rest[2] = function._phase(inputs[0][0], (1, step, 5))
        if step == 3:
            for halves, copies in zip(inputs, others, strict=True):
                for x, copied in zip(halves, copies, strict=True):
                    copied.copy_(x)
        function.eager(*inputs, *rest)
    run(kernel, pytree.arg_tree_leaves(*others, *rest), folder)
    names = ["weights", "gradient", *(key for key, _ in kept.specs)]
    found: dict[str, int] = {}
    for name, eager, other in zip(names, inputs, others, strict=True):
        a, b = (torch.cat(halves, dim=1) for halves in (eager, other))
        found[name] = int((a != b).sum())
    return found


def run(kernel: Kernel, flat: list[Tensor], folder: Path) -> None:
    """Call the kernel on `flat`, the flat arguments of the step, in place."""
    function = load(kernel, folder, [*IMPORTS, *_SHIM])
    rows, by_block = flat[0].shape[0], "r0_numel" in kernel.signature
    sizes = {"r0_numel": flat[0].shape[1], "xnumel": rows if by_block else flat[0].numel()}
    names = [name for name in kernel.signature if name != "XBLOCK"]
    values = [
        flat[int(passed.split("_")[0].removeprefix("arg"))] if passed.startswith("arg") else sizes[name]
        for name, passed in zip(names, kernel.arguments, strict=True)
    ]
    block = kernel.launch["XBLOCK"]
    constants = {"XBLOCK": block} if "XBLOCK" in function.arg_names else {}
    function[(-(-sizes["xnumel"] // block),)](*values, **constants)


def main() -> None:
    with open(sys.argv[1], "rb") as file, tempfile.TemporaryDirectory() as folder:
        for rule, kept, dtype, kernel in pickle.load(file):
            print(json.dumps(compare(rule, kept, dtype, kernel, Path(folder))), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
