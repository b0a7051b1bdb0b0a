"""A CUDA device that is not there: what Inductor writes for it, and what Triton's compiler makes of that.

Inductor asks a device for its properties and nothing else until a kernel is loaded, and Triton brings its own
assembler. So `kernels` gets the Triton source of an optimizer step from `toolkit.optim.inductor` itself, stopped where
it would load the kernel, and `machine_code` compiles a source for compute capability 9.0 and counts. Needs the
package `triton`; torch may be built without CUDA.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from toolkit.optim.inductor import Launch, compile_blocks
from toolkit.optim.kernel import StepFunction
from toolkit.optim.rule import Rule
from toolkit.state.codecs import BLOCK
from toolkit.state.layout import Layout

TARGET = GPUTarget("cuda", 90, 32)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_DEVICE = torch.device("cuda", 0)


class H100:
    """The properties of an H100 SXM, as torch gives them."""

    name, major, minor, multi_processor_count, warp_size = "NVIDIA H100", 9, 0, 132, 32
    regs_per_multiprocessor, max_threads_per_multi_processor, max_threads_per_block = 65536, 2048, 1024
    shared_memory_per_block, shared_memory_per_block_optin, shared_memory_per_multiprocessor = 49152, 232448, 233472
    total_memory, L2_cache_size, gcnArchName = 80 << 30, 50 << 20, ""
    clock_rate, memory_clock_rate, memory_bus_width = 1980000, 2619000, 5120


class Driver:
    """What Triton asks of a driver while it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel as Inductor wrote it.

    `signature` is the Triton type of each argument by name, `aligned` the numbers of those known to be multiples of 16
    (pointers: of 16 bytes), `launch` the fixed launch configuration, `arguments` what the call passes: "arg3_1" is
    number 3 of the step's flat arguments, all else a size.
    """

    name: str
    text: str
    signature: Mapping[str, str]
    aligned: frozenset[int]
    launch: Mapping[str, int]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What Inductor wrote for one step: its kernels, and how many buffers it allocates beside its arguments."""

    kernels: list[Kernel]
    intermediates: int


@dataclass(frozen=True)
class MachineCode:
    """What one thread holds and runs: registers, bytes spilled and on the stack, shared bytes, opcodes."""

    registers: int
    spilled: int
    stack: int
    shared: int
    opcodes: Counter[str]

    def occupancy(self, warps: int) -> float:
        """The share of a multiprocessor's 64 warps that its registers have room for, in programs of `warps` warps."""
        by_warp = -(-self.registers // 8) * 8 * 32  # registers are given out in eights, to warps
        programs = min(65536 // (by_warp * warps), 32, 64 // warps)
        return programs * warps / 64


@contextmanager
def pretend() -> Iterator[None]:
    """While this lasts, torch and Inductor see one H100."""
    from torch._dynamo.device_interface import CudaInterface

    answers = {
        "is_available": True,
        "get_device_properties": H100(),
        "get_device_capability": (9, 0),
        "current_device": 0,
        "device_count": 1,
        "synchronize": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.empty(0, dtype=torch.uint8),
        "set_rng_state": None,
    }

    def always(value: Any) -> Any:
        return staticmethod(lambda *args, **kwargs: value)

    with ExitStack() as stack:
        patch = stack.enter_context
        _forget()
        stack.callback(_forget)
        for name, value in answers.items():
            patch(mock.patch(f"torch.cuda.{name}", always(value)))
            if hasattr(CudaInterface, name):
                patch(mock.patch.object(CudaInterface, name, always(value)))
        # The method, unlike the operator, wants a device's driver before it looks who is to carry it out.
        patch(mock.patch("torch.Tensor.copy_", lambda x, source: torch.ops.aten.copy_.default(x, source)))
        patch(mock.patch("torch._subclasses.fake_tensor.init_gpu_context"))
        # Patterns of attention are traced on tensors of the device itself; the step has none.
        for passes in ("joint_graph", "post_grad"):
            patch(mock.patch(f"torch._inductor.fx_passes.{passes}.lazy_init"))
        patch(mock.patch.object(driver, "_active", Driver()))
        patch(mock.patch("torch.version.cuda", "13.0"))
        patch(mock.patch.object(CudaInterface, "get_compute_capability", always(90)))
        patch(mock.patch.object(CudaInterface.Worker, "get_device_properties", always(H100())))
        patch(mock.patch.object(CudaInterface.Worker, "current_device", always(0)))
        yield


def _forget() -> None:
    """Let torch look again whether there is a GPU that Triton compiles for."""
    import torch.utils._triton as answers

    for answer in vars(answers).values():
        if hasattr(answer, "cache_clear"):
            answer.cache_clear()


class _Written(Exception):
    """Inductor has written its module; nothing can load it here."""


def step_arguments(
    rule: type[Rule],
    kept: Layout,
    dtype: torch.dtype,
    blocks: int,
    device: torch.device | str,
    name: str = "update",
) -> tuple[StepFunction, list[list[Tensor]], list[Tensor | None]]:
    """A function of a rule and what it takes, for weights and gradients of `dtype`: tensors of zeros."""
    made = rule(total_steps=10) if "total_steps" in rule.model_fields else rule()
    function = StepFunction(rule, tuple(made.scalars(1)), kept, name)
    theta, g = (torch.zeros(blocks, BLOCK, dtype=dtype, device=device) for _ in range(2))
    parts = list(kept.allocate(blocks * BLOCK, torch.device(device)).values())
    parts += [torch.zeros(blocks, BLOCK if wide else 1, device=device) for wide in function.wide]
    rest: list[Tensor | None] = [torch.zeros(len(made.scalars(1)), device=device), torch.ones((), device=device)]
    rest.append(function._phase(theta, (0, 1, 0)))
    return function, function._inputs(theta, g, parts), rest


def write(rule: type[Rule], kept: Layout, dtype: torch.dtype, launch: Launch, name: str = "update") -> Source:
    """The Triton source of a function of the rule for weights and gradients of `dtype` on an H100."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    written: list[str] = []

    def stop(code: str) -> None:
        written.append(code)
        raise _Written

    with pretend(), inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        with FakeTensorMode():
            function, inputs, rest = step_arguments(rule, kept, dtype, 64, _DEVICE, name)
        with mock.patch.object(GraphLowering, "save_output_code", staticmethod(stop)):
            try:
                compile_blocks(function.eager, inputs, rest, launch)
            except Exception:
                if not written:  # an error before there was anything to stop
                    raise
    [code] = written
    texts = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S)
    kernels = [_parse(name, text, _arguments(name, code)) for name, text in texts]
    return Source(kernels, len(re.findall(r"= empty_strided_cuda\(", code)))


def _arguments(name: str, code: str) -> tuple[str, ...]:
    first, *_ = re.findall(rf"^\s+{name}\.run\((.*), stream=", code, re.M)  # one kernel may serve several tensors
    return tuple(first.split(", "))


def _parse(name: str, text: str, arguments: tuple[str, ...]) -> Kernel:
    def literal(pattern: str) -> Any:
        found = re.search(pattern, text, re.S)
        assert found is not None, (pattern, text)
        return ast.literal_eval(found.group(1))

    signature = literal(r"'signature': (\{.*?\})")
    [attributes] = literal(r"'configs': (\[\{.*?\}\])")
    launch = literal(r"config=(\{.*?\})")
    aligned = frozenset(number for (number,), what in attributes.items() if ["tt.divisibility", 16] in what)
    return Kernel(name, text[text.index("@triton.jit") :], signature, aligned, launch, arguments)


def load(kernel: Kernel, folder: Path, imports: Sequence[str]) -> Any:
    """The kernel as a Triton function, by way of a file in `folder` (Triton reads functions' source)."""
    file = folder / f"{kernel.name}_{next(_numbers)}.py"
    file.write_text("\n".join([*imports, kernel.text]))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kernel.name)


_numbers = itertools.count()

IMPORTS = (
    "import triton",
    "import triton.language as tl",
    "from torch._inductor.runtime import triton_helpers",
    "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math",
)


def machine_code(kernel: Kernel) -> MachineCode:
    """Compile for the launch configuration that the kernel names, and count."""
    with tempfile.TemporaryDirectory() as folder:
        function = load(kernel, Path(folder), IMPORTS)
    constants = {"XBLOCK": kernel.launch["XBLOCK"]} if "XBLOCK" in function.arg_names else {}
    return assemble(function, kernel.signature, constants, kernel.aligned, kernel.launch["num_warps"])


def assemble(
    function: Any, signature: Mapping[str, str], constants: Mapping[str, Any], aligned: frozenset[int], warps: int
) -> MachineCode:
    """Compile a Triton function for compute capability 9.0 and count its machine code."""
    names = list(function.arg_names)
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    source = ASTSource(
        function,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(number,): [["tt.divisibility", 16]] for number in aligned},
    )
    for tool in ("ptxas", "cuobjdump"):
        (_TOOLS / tool).chmod(0o755)  # wheels do not always keep that
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": 1})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = dict(re.findall(r"(REG|LOCAL|STACK|SHARED):(\d+)", _dump("-res-usage", cubin.name)))
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", _dump("-sass", cubin.name), re.M)
    registers, spilled, stack, shared = (int(usage[key]) for key in ("REG", "LOCAL", "STACK", "SHARED"))
    return MachineCode(registers, spilled, stack, shared, Counter(code.split(".")[0] for code in opcodes))


def _dump(flag: str, file: str) -> str:
    return subprocess.run([_TOOLS / "cuobjdump", flag, file], capture_output=True, text=True, check=True).stdout
