"""What the compiled optimizer step becomes on a GPU, counted without one.

    python tests/benchmarks/gpu_static.py [--rules AMCS] [--formats 8bit] [--weights bf16+8] [--write PAGE]
    python tests/benchmarks/gpu_static.py --launches [--formats 8bit compact]
    python tests/benchmarks/gpu_static.py --select --rules AMCS AdamW8 --formats 8bit --weights bf16+8

Prints a Markdown table; `--write docs/benchmarks/gpu-static.md` renders the page, with
`--rules AMCS AMCSSingle AdamW8 SOAM`: every rule takes long. `--launches` counts several launch
configurations beside the chosen one; `--select` the step as it would be if the device and not the host decided
whether it is skipped: each number that is written is chosen between the new one and the old. FlashAdamW's own kernel
is counted the same way where `flashoptim` is installed (`pip install flashoptim`); else its row stays. Needs the
package `triton` (extra `gpu-static`); torch may be built without CUDA.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from absent_gpu import MachineCode, assemble, machine_code, write

from toolkit.optim import RULES, AMCSRule, kernel
from toolkit.optim.inductor import Launch
from toolkit.optim.rule import Rule
from toolkit.state.codecs import BLOCK, FORMATS, MIXES
from toolkit.state.layout import Layout, layout, state_formats
from toolkit.state.remainders import MASTER, WEIGHTS

ISSUE, COPY = 29e12, 3.0e12
"""Lane instructions and copied bytes a second of an H100 SXM: 132 x 4 x 32 lanes at 1.7 GHz, and what it copies."""

LAUNCHES = [(1, 1), (1, 2), (2, 1), (4, 1), (4, 4), (8, 4), (16, 4)]
"""Blocks and warps to a program that `--launches` counts; (4, 1) is Inductor's own choice from 1,024 blocks up."""

HEADER = (
    "| rule | state_format | weights | kernels | intermediates | instructions | special | registers | spilled | stack "
    "| occupancy | bytes | of copy speed |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Case:
    """A rule with a state format and a way of keeping weights: what is compiled together."""

    rule: type[Rule]
    state_format: str
    weights: str

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and gradient."""
        return torch.float32 if self.weights == MASTER else torch.bfloat16

    @property
    def layout(self) -> Layout:
        formats = state_formats(self.rule.states, self.state_format, where="here")
        return layout(self.rule.states, formats, self.weights, self.dtype).opened

    @property
    def bytes_moved(self) -> float:
        """By a step, per element: weights and state are read and written, the gradient is read."""
        return 3 * self.dtype.itemsize + 2 * sum(self.layout.bytes_per_element().values())

    def __str__(self) -> str:
        return f"| {self.rule.__name__.removesuffix('Rule')} | {self.state_format} | {self.weights} |"


@dataclass(frozen=True)
class Count:
    """What one step costs at one launch configuration. `elements`: by thread; `warps`: by program."""

    kernels: int
    intermediates: int
    code: MachineCode
    elements: float
    warps: int
    bytes_moved: float

    @property
    def instructions(self) -> float:
        """Per element."""
        return self.code.opcodes.total() / self.elements

    @property
    def share(self) -> float:
        """Of copy speed, at best: less than 1 where issuing the instructions takes longer than moving the bytes."""
        return min(1.0, self.bytes_moved / COPY / (self.instructions / ISSUE))

    def __str__(self) -> str:
        code = self.code
        cells = [str(self.kernels), str(self.intermediates), f"{self.instructions:.0f}"]
        cells += [f"{code.opcodes['MUFU'] / self.elements:.1f}", str(code.registers), str(code.spilled)]
        cells += [str(code.stack), f"{code.occupancy(self.warps):.0%}", f"{self.bytes_moved:.2f}", f"{self.share:.0%}"]
        return " ".join(f"{cell} |" for cell in cells)


def shipped_rules() -> list[type[Rule]]:
    """Every rule of the package, variants by mode too."""
    found: dict[type[Rule], None] = {}
    for optimizer in RULES.values():
        if optimizer.__module__.startswith("toolkit."):
            for mode in ("", "mixed", "single"):
                found |= dict.fromkeys(optimizer.rule.variants({"mode": mode}))
    return list(found)


def shipped() -> Iterator[Case]:
    """Every rule, state format and way of keeping weights of the package."""
    for rule in shipped_rules():
        for state_format in (*FORMATS, *MIXES):
            for weights in (MASTER, *WEIGHTS):
                yield Case(rule, state_format, weights)


def count(case: Case, launch: Launch) -> Count:
    """Compile the step of `case` and count its first kernel."""
    source = write(case.rule, case.layout, case.dtype, launch)
    kernel = source.kernels[0]
    warps = kernel.launch["num_warps"]
    by_program = kernel.launch["XBLOCK"] * (BLOCK if "r0_numel" in kernel.signature else 1)
    code = machine_code(kernel)
    return Count(len(source.kernels), source.intermediates, code, by_program / (32 * warps), warps, case.bytes_moved)


@contextmanager
def decided_on_the_device() -> Iterator[None]:
    """Steps that are traced within it change nothing where the factor of their gradient is not finite."""
    finite: list[torch.Tensor] = []

    class Opened(kernel._Opened):
        def __init__(self, layout: Layout, scale: torch.Tensor, *rest: Any) -> None:
            finite[:] = [scale * 0 == 0]
            super().__init__(layout, scale, *rest)

    def write_if_finite(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(torch.where(finite[0], source.to(target.dtype), target))

    with mock.patch.object(kernel, "_Opened", Opened), mock.patch.object(kernel, "_write", write_if_finite):
        yield


def flash_adamw() -> Count:
    """FlashAdamW's own kernel (`flashoptim`): 8-bit state in groups of 32, bf16 weights and 8 bits beside them."""
    import triton.language as tl
    from flashoptim import optimizers as flash

    constants = {
        "GROUP_SIZE": 32,
        "DECOUPLED_WEIGHT_DECAY": True,
        "PARAM_DTYPE": tl.bfloat16,
        "USE_ECC": True,
        "QUANTIZE_OPTIM_STATES": True,
        "SIGNED_ERROR_T": tl.int8,
        "NUM_MANTISSA_BITS": flash._NUM_MANTISSA_BITS[torch.bfloat16],
        "SIGNED_MAX_VAL": 127,
        "BLOCK_SIZE_N": 1024,
    }
    pointers = ("*i8", "*fp16", "*u8", "*fp16", "*bf16", "*bf16", "*i8")
    kernel, scalars = flash._triton_adam_kernel, ("i32", *["fp32"] * 5, "i32")
    signature = dict(zip(kernel.arg_names, (*pointers, *scalars), strict=False))
    aligned = frozenset(range(len(pointers) + 1))  # and the number of elements
    code = assemble(kernel, signature, constants, aligned, warps=4)  # Triton's default: it names none
    return Count(1, 0, code, 1024 / 128, 4, 3 * 2 + 2 * (1 + 1 + 1 + 2 * 2 / 32))


def flash_rows(written: Path | None) -> Iterator[str]:
    """FlashAdamW's row; without that package the one that the page `written` has."""
    if find_spec("flashoptim") is not None:
        names = f"{version('flashoptim')} (Triton {version('triton')})"
        yield f"| FlashAdamW {names} | its own | its own | {flash_adamw()}"
    elif written is not None and written.is_file():
        yield from (line for line in written.read_text().splitlines() if line.startswith("| FlashAdamW"))


def launch_rows(case: Case) -> Iterator[str]:
    """The step of `case` at LAUNCHES, where its blocks have scales."""
    for rows, warps in LAUNCHES:
        yield f"{case} {rows} x {warps} | {count(case, Launch(rows=rows, warps=(warps, 4)))}"


def page(table: str, launches: str) -> str:
    chosen = Launch()
    versions = (
        f"torch {torch.__version__.split('+')[0]}, Triton {version('triton')}, Python {platform.python_version()}"
    )
    return f"""# The optimizer step on a GPU, counted without one

Rendered by `python tests/benchmarks/gpu_static.py --rules AMCS AMCSMixed AMCSSingle AdamW8 SOAM --write
docs/benchmarks/gpu-static.md` ({versions}).

**No GPU has run any of this.** Inductor writes the step's Triton kernel for an H100 that is not there, Triton's own
assembler compiles it for compute capability 9.0, and the machine code is counted: instructions and special-function
instructions per element, registers of a thread, bytes that it spills and has on its stack, the share of a
multiprocessor's warps that those registers leave room for, and bytes moved per element, weights and state both ways.
An H100 issues about 29e12 lane instructions and copies about 3.0e12 bytes a second; "of copy speed" is what
that allows at best. A prediction, and an upper bound.

Every step is one kernel with 32-bit indices, without intermediates of the tensor's size and without spills
(`tests/unit/test_gpu_static.py`); larger tensors are stepped in several calls of at most 2^30 elements.

Square roots and quotients of fp32 are approximate, one or two instructions each, off by a unit in the last place or
two: at most one code in 1,000 differs for it (`tests/unit/test_approximate.py`). Denormal numbers count as 0 in them,
and quotients by more than 2^126 are 0. Inverses, those of scales among them, have no such limits.

Launch configuration, the same for every tensor: {chosen.rows} blocks of 256 elements to a program of
{chosen.warps[0]} warps where blocks have scales, {chosen.elements} elements to {chosen.warps[1]} warps where they have
none (`toolkit.optim.inductor.Launch`).

{table}

## Launch configurations

Blocks x warps to a program. From 1,024 blocks up Inductor itself takes 4 x 1 for `8bit`, whose stack is memory traffic
that the columns do not show; for `compact` and `minimal` it reads every block twice and times configurations
on the first tensor that comes. On a device: `tests/gpu/measure.py`.

{launches}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+")
    parser.add_argument("--formats", nargs="+")
    parser.add_argument("--weights", nargs="+")
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--select", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    options = parser.parse_args()
    cases = [
        case
        for case in shipped()
        if (not options.rules or case.rule.__name__.removesuffix("Rule") in options.rules)
        and (not options.formats or case.state_format in options.formats)
        and (not options.weights or case.weights in options.weights)
    ]
    launch_header = HEADER.replace("| kernels", "| launch | kernels").replace("|---|", "|---|---|", 1)

    def show(lines: Iterator[str], header: str) -> str:
        shown = [header]
        print(header, flush=True)
        for line in lines:
            print(line, flush=True)
            shown.append(line)
        return "\n".join(shown)

    def by_case() -> Iterator[str]:
        for case in cases:
            yield f"{case} {count(case, Launch())}"
        yield from flash_rows(options.write)

    def by_launch(some: list[Case]) -> Iterator[str]:
        for case in some:
            yield from launch_rows(case)

    if options.select:
        with decided_on_the_device():
            show((f"{case} {count(case, Launch())}" for case in cases), HEADER)
        return
    if options.launches:
        show(by_launch([case for case in cases if case.state_format != "fp32"]), launch_header)
        return
    table = show(by_case(), HEADER)
    if options.write:
        examples = [Case(AMCSRule, "8bit", "bf16+8"), Case(AMCSRule, "compact", "bf16+4")]
        options.write.write_text(page(table, show(by_launch(examples), launch_header)))


if __name__ == "__main__":
    main()
