"""The optimizer step on blocks: decode -> rule -> encode, one function, compiled or eager.

`torch.compile` makes it one Triton kernel on a GPU and one vectorised, threaded C++ loop on a CPU. The same
source runs eagerly as reference and fallback. The number of blocks is dynamic: one graph serves every size.

Where a code takes 4 bits, lane i of a block shares a byte with lane i + BLOCK/2. The function then gets the halves of
every block as tensors of their own and works on both at once, so that packing is elementwise too: written on whole
blocks, it would be a second loop with an intermediate of full size.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from toolkit.optim.layout import Layout
from toolkit.optim.rule import Rule
from toolkit.state.codecs import BLOCK, decode_slabs, encode_slabs, pack, unpack
from toolkit.state.weights import rounding_phase, thresholds

logger = logging.getLogger("toolkit")

EAGER_ROWS = 4096
"""Blocks per slice of the eager step: bounds its fp32 temporaries to a few MB each."""

PATIENCE_SECONDS = 10.0
"""After so long the first call says that it compiles; what is in the compiler's cache takes less."""

# Inductor stores an intermediate that took many operations or reads, here a full-size fp32 copy of the update
# and one more pass over memory. Computing it again costs less: the step must stay one loop over each block.
_NEVER_STORE: dict[str, Any] = dict.fromkeys(
    ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"), 10**9
)

BlockStep = Callable[..., None]


class StepFunction:
    """One step of one rule on tensors of one layout, in place. `rounds`: weights are rounded stochastically."""

    def __init__(self, rule: type[Rule], names: tuple[str, ...], layout: Layout) -> None:
        stored = [codec.name for codec in layout.codecs] + ([layout.remainder.name] if layout.remainder else [])
        self.name = "_".join([rule.__name__, *stored])
        self._parts = [part for _, part in layout.parts()]
        narrow = [codec.bits for codec in layout.codecs] + ([layout.remainder.bits] if layout.remainder else [])
        self._lanes = BLOCK // 2 if 4 in narrow else BLOCK
        self.rounds = layout.remainder is not None and layout.remainder.bits < 16
        self.eager = _block_step(rule, names, layout, self.name)
        self._compiled: BlockStep | None = None
        self.fallback_reason: str | None = None

    def __call__(
        self,
        compiled: bool,
        theta: Tensor,
        g: Tensor,
        scalars: Tensor,
        scale: Tensor,
        parts: Sequence[Tensor],
        rounding: tuple[int, int, int],
    ) -> None:
        """Update `theta` and `parts`.

        Args:
            compiled: through torch.compile, where that works.
            theta: weights, [blocks, BLOCK], blocks >= 2 (the compiler would make a special case of 1).
            g: gradient, same shape, any float dtype.
            scalars: fp32 [k], in the order of `rule.scalars()`.
            scale: fp32, 0-d; multiplies the gradient.
            parts: one tensor for each of `layout.parts()`, of as many blocks.
            rounding: seed, optimizer step and number of the first block in its parameter group.
        """
        if compiled and self.fallback_reason is None:
            inputs = self._inputs(theta, g, parts)
            for tensor in _flat(inputs):
                torch._dynamo.mark_dynamic(tensor, 0)
            patience = nullcontext() if self._compiled is not None else _patience(self.name)
            if self._compiled is None:
                self._compiled = torch.compile(self.eager, fullgraph=True, options=_NEVER_STORE)
            try:
                with patience:
                    return self._compiled(*inputs, scalars, scale, self._phase(theta, rounding))
            except _compiler_errors() as error:
                # Compilation fails before anything ran, so the eager step starts from untouched tensors.
                lines = str(error).strip().splitlines() or [type(error).__name__]
                self.fallback_reason = lines[0]
                logger.warning(
                    "%s runs eagerly, with the same numbers but slower and with more temporary memory, because "
                    "torch.compile failed: %s",
                    self.name,
                    self.fallback_reason,
                )
        seed, step, block = rounding
        for start in range(0, theta.shape[0], EAGER_ROWS):
            rows = slice(start, start + EAGER_ROWS)
            inputs = self._inputs(theta[rows], g[rows], [part[rows] for part in parts])
            self.eager(*inputs, scalars, scale, self._phase(theta, (seed, step, block + start)))
        return None

    def _inputs(self, theta: Tensor, g: Tensor, parts: Sequence[Tensor]) -> list[list[Tensor]]:
        whole = [theta, g, *parts]
        # Scales and packed codes are taken whole, what has a value for every lane in slabs.
        wide = [True, True, *(part.per_block == BLOCK for part in self._parts)]
        return [list(x.split(self._lanes, dim=1)) if cut else [x] for x, cut in zip(whole, wide, strict=True)]

    def _phase(self, theta: Tensor, rounding: tuple[int, int, int]) -> Tensor | None:
        return torch.full((), float(rounding_phase(*rounding)), device=theta.device) if self.rounds else None


def _flat(inputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [tensor for slabs in inputs for tensor in slabs]


@functools.cache
def step_function(rule: type[Rule], names: tuple[str, ...], layout: Layout) -> StepFunction:
    """The one StepFunction of this rule and this layout, shared by all optimizers of the process."""
    return StepFunction(rule, names, layout)


def _block_step(rule: type[Rule], names: tuple[str, ...], layout: Layout, title: str) -> BlockStep:
    codecs, remainder = layout.codecs, layout.remainder
    place = {state.name: index for index, state in enumerate(layout.states)}
    # By state, the one that its codes are relative to.
    anchors = [
        place[state.near] if codec.relative and state.near is not None else None
        for state, codec in zip(layout.states, codecs, strict=True)
    ]

    def step(*inputs: Any) -> None:
        theta, g, *parts = inputs[:-3]
        scalars, scale, phase = inputs[-3:]
        for slab in [x for slabs in (theta, g, *parts) for x in slabs]:
            torch._check(slab.shape[0] == theta[0].shape[0])  # one size to the compiler, too
        stored = iter(parts)
        named = dict(zip(names, scalars.unbind(), strict=True))
        held = [[next(stored) for _ in codec.parts()] for codec in codecs]
        low = list(stored)
        states = [decode_slabs(codec, *tensors) for codec, tensors in zip(codecs, held, strict=True)]
        for index, anchor in enumerate(anchors):
            if anchor is not None:
                states[index] = [x + near for x, near in zip(states[index], states[anchor], strict=True)]
        weights = [slab.float() for slab in theta]
        if remainder is not None:
            rests = zip(*([unpack(low[0][0])] if remainder.bits == 4 else low), strict=True)
            weights = [remainder.join(slab, *rest) for slab, rest in zip(theta, rests, strict=True)]

        results = [
            rule.update(weights[i], g[i].float() * scale, *(state[i] for state in states), **named)
            for i in range(len(theta))
        ]
        new_theta, *new_states = (list(slabs) for slabs in zip(*results, strict=True))

        for index, codec in enumerate(codecs):
            slabs, anchor = new_states[index], anchors[index]
            if anchor is not None:
                slabs = [x - near for x, near in zip(slabs, new_states[anchor], strict=True)]
            for target, source in zip(held[index], encode_slabs(codec, slabs), strict=True):
                _write(target, source)
        if remainder is None:
            _write(theta, new_theta)
            return
        cut, lane = [], 0
        for slab in new_theta:
            rows, lanes = slab.shape
            cut.append(remainder.split(slab, None if phase is None else thresholds(phase, rows, lane, lanes)))
            lane += lanes
        written, *rest_parts = zip(*cut, strict=True)
        _write(theta, written)
        for target, new_rests in zip(low, rest_parts, strict=True):
            _write(target, [pack(new_rests)] if remainder.bits == 4 else new_rests)

    # A code object of its own: the compiler counts recompilations per code object, and all rules share `step`.
    code = step.__code__.replace(co_name="".join(c if c.isalnum() else "_" for c in title))
    return FunctionType(code, step.__globals__, code.co_name, step.__defaults__, step.__closure__)


def _write(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@contextmanager
def _patience(name: str) -> Iterator[None]:
    """Say, once for each machine, what takes so long when the first call does."""
    words = "compiling the optimizer step %s, which takes about a minute on two cores; later runs take it from a cache"
    timer = threading.Timer(PATIENCE_SECONDS, logger.warning, (words, name))
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _compiler_errors() -> tuple[type[Exception], ...]:
    import torch._dynamo.exc as dynamo
    import torch._inductor.exc as inductor

    return (dynamo.TorchDynamoException, inductor.InvalidCxxCompiler, inductor.CppCompileError)
