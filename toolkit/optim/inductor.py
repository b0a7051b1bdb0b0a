"""The step on blocks as Inductor compiles it: once for every number of blocks, ahead of the first call.

The function is traced on tensors that have no data and whose number of blocks is a symbol, and the graph goes to
Inductor as it is. Dynamo has no part in it: it takes where a view begins in its storage for one more size, makes a
graph for each of several such cases, gives up after eight, and checks every tensor against its guards in every call.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit.optim import kept, vectors
from toolkit.optim.vectors import vector_code

if TYPE_CHECKING:
    from torch._inductor.choices import InductorChoices

Halves = Sequence[Sequence[Tensor]]
"""One list of tensors for weights, gradient and each stored part: see `toolkit.optim.kernel`."""

BlockStep = Callable[..., None]

_OPTIONS: dict[str, Any] = {
    # Inductor stores an intermediate that took many operations or reads, here a full-size fp32 copy of the update
    # and one more pass over memory. Computing it again costs less: the step must stay one loop over each block.
    **dict.fromkeys(("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"), 10**9),
    # It is one kernel. The default is a pool of up to 32 processes beside every rank.
    "compile_threads": 1,
}

_SIZE = 2**14
"""Blocks that the compiler takes for typical, where it asks: enough for a CPU's loop to be worth threads."""


@dataclass(frozen=True)
class Launch:
    """How a GPU runs the step's kernel, the same for every tensor.

    Inductor's own choice depends on the first tensor that happens to come and, for some formats, on timings, for which
    it copies what the kernel writes; ranks may differ in it. `docs/benchmarks/gpu-static.md` has the counts behind
    these numbers, which are predictions: no GPU has timed them.

    Attributes:
        rows: blocks of 256 elements to a program, where blocks have scales (XBLOCK). Not 1: torch 2.11's Inductor
            fails to write that.
        elements: elements to a program, where they have none (XBLOCK).
        warps: of 32 threads to a program, in the order of the two.
    """

    rows: int = 8
    elements: int = 512
    warps: tuple[int, int] = (4, 4)

    def __call__(self) -> InductorChoices:
        """What Inductor asks for choices (`inductor_choices_class`); part of its cache's key."""
        from torch._inductor.choices import InductorChoices
        from torch._inductor.codegen.triton import FixedTritonConfig

        launch = self

        class Choices(InductorChoices):
            @staticmethod
            def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
                return True  # a block is in registers whole: Inductor would read half a block (4-bit codes) twice

            def triton_kernel_kwargs(
                self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: dict[str, Any]
            ) -> dict[str, Any]:
                by_block = features.is_reduction()
                fixed = {
                    "XBLOCK": launch.rows if by_block else launch.elements,
                    "num_warps": launch.warps[0 if by_block else 1],
                    "num_stages": 1,
                }
                return {**kernel_kwargs, "fixed_config": FixedTritonConfig(fixed)}

            def uuid(self) -> str:
                return f"{launch!r}, {_as_written_here()}"

        return Choices()


@functools.cache
def _as_written_here() -> str:
    """For the key of Inductor's cache: code that was written before these files changed is not the same."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, vectors.__file__))).hexdigest()


def _usual_choices() -> InductorChoices:
    """Inductor's own, with a key."""
    from torch._inductor.choices import InductorChoices

    class Choices(InductorChoices):
        def uuid(self) -> str:
            return _as_written_here()

    return Choices()


@contextmanager
def first_of_all(work: str) -> Iterator[None]:
    """Let one process of this machine do `work` while others wait, which then find it in the compiler's cache.

    All ranks come to the same kernel at once, and on a CPU, where it is the same for all, loading it takes far less.
    Where the cache cannot be locked, or the lock is held for longer than Inductor would wait, each compiles its own.
    """
    from torch._inductor.codecache import LOCK_TIMEOUT
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils._filelock import FileLock

    with ExitStack() as held:
        with contextlib.suppress(OSError):  # filelock's Timeout is one
            folder = Path(cache_dir()) / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            name = f"leanstate-{hashlib.sha256(work.encode()).hexdigest()[:20]}.lock"
            held.enter_context(FileLock(folder / name, timeout=LOCK_TIMEOUT))
        yield


def compile_blocks(
    function: BlockStep, inputs: Halves, rest: Sequence[Tensor | None], launch: Launch, name: str | None = None
) -> BlockStep:
    """`function(*inputs, *rest)` compiled for tensors of these types, strides and device and any number of blocks.

    `name` says which of this package's functions it is, and nothing else could go by it; then it is kept on disk.

    Whatever it raises, nothing has run: tensors are read for their properties only. Scales may begin at any address
    (a slice of them does, whose first block is no multiple of four); all else is best at multiples of 16 bytes, and is
    copied before and after where it is not.
    """
    import torch._inductor.config as settings
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._python_dispatch import _disable_current_modes

    flat, structure = pytree.tree_flatten((*inputs, *rest))

    def run(*tensors: Tensor) -> tuple[()]:
        function(*pytree.tree_unflatten(list(tensors), structure))
        return ()

    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch.no_grad(), _disable_current_modes(), settings.patch(compile_threads=1):
        on_gpu = launch if flat[0].device.type != "cpu" else None
        options = _options(on_gpu)
        file = kept.place(name, flat) if name is not None else None
        compiled = kept.load(file, options) if file is not None else None
        if compiled is None:
            tensors = _without_data(flat, mode)
            with mode:
                graph = make_fx(run)(*tensors)
            with kept.writable(file):
                compiled = _compile(graph, tensors, mode, on_gpu, options)
            if file is not None:
                kept.store(file, compiled)

    count = len(inputs)  # what `call` refers to lives as long as it does: no tensors

    def call(*arguments: Any) -> None:
        halves, others = arguments[:count], arguments[count:]
        compiled(*(x for part in halves for x in part), *others)

    return call


def _without_data(flat: Sequence[Any], mode: Any) -> list[Any]:
    """Stand-ins for tensors: those of two dimensions have a symbol for the first, one for all."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource("blocks")
    symbol = mode.shape_env.create_symbol(_SIZE, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    blocks = mode.shape_env.create_symintnode(symbol, hint=_SIZE, source=source)

    def stand_in(x: Tensor) -> Tensor:
        if x.dim() < 2:
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)
        lanes, stride = x.shape[1], x.stride(0)
        begin = 1 if lanes == 1 else 0  # a scale: four bytes from an address that the compiler would count on
        storage = torch.empty((blocks - 1) * stride + lanes + begin, dtype=x.dtype, device=x.device)
        return storage.as_strided((blocks, lanes), x.stride(), begin)

    with mode:
        return [stand_in(x) if isinstance(x, Tensor) else x for x in flat]


def _options(launch: Launch | None) -> dict[str, Any]:
    """Inductor's, for this process's processor, or for a GPU's `launch`."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if launch is None:
        # Part of the cache's key, which lacks the instruction set: code for one is wrong when built for another.
        return _OPTIONS | {"cpp.simdlen": pick_vec_isa().bit_width(), "inductor_choices_class": _usual_choices}
    # Constants would be folded by running them on the device.
    return _OPTIONS | {"inductor_choices_class": launch, "joint_graph_constant_folding": False}


def _compile(graph: Any, tensors: list[Any], mode: Any, launch: Launch | None, options: dict[str, Any]) -> BlockStep:
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.cpu_vec_isa import VecAVX2, pick_vec_isa
    from torch._inductor.virtualized import V

    with ExitStack() as stack:
        if launch is None:
            stack.enter_context(vector_code(avx2=isinstance(pick_vec_isa(), VecAVX2)))
        else:
            stack.enter_context(V.set_choices_handler(launch()))
            stack.enter_context(_short_instructions())
        stack.enter_context(_each_value_once())
        stack.enter_context(tracing(TracingContext(mode)))
        compiled: Any = compile_fx(graph, tensors, config_patches=options)
        return compiled


@contextmanager
def _each_value_once() -> Iterator[None]:
    """Let Inductor write the same code in a fraction of the time.

    In one loop a value that is used twice is written twice, with all that it is made of, and the copies are found
    equal and dropped only at the end: a step of 700 operations with halves of blocks takes 12,000, half a minute. Here
    a loop asks for each value once. What Inductor looks up about types for every operation, it looks up once.
    """
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
    from torch._inductor.ir import Pointwise
    from torch._inductor.virtualized import V

    load, look_up = Pointwise.make_loader, DtypePropagationOpsHandler.__init__
    # By id: with the loop that asked last, and the values that it was given, by index.
    loops: dict[int, tuple[Pointwise, Any, dict[Any, Any]]] = {}

    def make_loader(self: Pointwise) -> Callable[[Sequence[Any]], Any]:
        loader = load(self)

        def once(index: Sequence[Any]) -> Any:
            loop = V.get_ops_handler()
            if id(self) not in loops or loops[id(self)][1] is not loop:
                loops[id(self)] = (self, loop, {})
            values, place = loops[id(self)][2], tuple(index)
            if place not in values:
                values[place] = loader(index)
            return values[place]

        return once

    def look_up_once(self: DtypePropagationOpsHandler) -> None:
        if not vars(self):
            look_up(self)

    with (
        mock.patch.object(Pointwise, "make_loader", make_loader),
        mock.patch.object(DtypePropagationOpsHandler, "__init__", look_up_once),
    ):
        yield


@contextmanager
def _short_instructions() -> Iterator[None]:
    """Let Triton code that Inductor writes take a GPU's one instruction where there is one.

    Square roots and quotients of fp32 are then approximate, off by a unit in the last place or two; denormal numbers
    count as 0 in them, and a quotient by more than 2^126 is 0. Exact roots take some 15 instructions each, and codes
    are made of roots; quotients without those limits take 8. Inverses, such as those of scales, which are one a block,
    have no such limits. A maximum or minimum stays NaN where one of the two is. Codes are made of fp32 by way of int32,
    which needs no mask before four of them are put in one register.
    """
    from torch._inductor.codegen.triton import TritonKernel

    usual: Any = TritonKernel.overrides

    class Short(usual):
        @staticmethod
        def sqrt(x: Any) -> str:
            return f"tl.sqrt({x})" if x.dtype == torch.float32 else str(usual.sqrt(x))

        @staticmethod
        def truediv(x: Any, y: Any) -> str:
            if x.dtype == y.dtype == torch.float32:
                return f"libdevice.fast_dividef({x}, {y})"
            return str(usual.truediv(x, y))

        @staticmethod
        def reciprocal(x: Any) -> str:
            return f"(1.0 / {x})" if x.dtype == torch.float32 else str(usual.reciprocal(x))

        @staticmethod
        def to_dtype(x: Any, dtype: torch.dtype, src_dtype: torch.dtype | None = None, **kwargs: Any) -> str:
            if src_dtype == torch.float32 and dtype in (torch.int8, torch.uint8):
                return f"{x}.to(tl.int32).to({'tl.int8' if dtype == torch.int8 else 'tl.uint8'})"
            return str(usual.to_dtype(x, dtype, src_dtype, **kwargs))

        @staticmethod
        def maximum(a: Any, b: Any) -> str:
            return f"tl.maximum({a}, {b}, tl.PropagateNan.ALL)"

        @staticmethod
        def minimum(a: Any, b: Any) -> str:
            return f"tl.minimum({a}, {b}, tl.PropagateNan.ALL)"

    TritonKernel.overrides = Short
    try:
        yield
    finally:
        TritonKernel.overrides = usual
