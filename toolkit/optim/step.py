"""The optimizer step on blocks: decode -> rule -> encode, one function, compiled or eager.

`torch.compile` makes it one Triton kernel on a GPU and one vectorised, threaded C++ loop on a CPU. The same
source runs eagerly as reference and fallback. The number of blocks is dynamic: one graph serves every size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from toolkit.optim.rule import Rule
from toolkit.state.codecs import Codec

logger = logging.getLogger("toolkit")

EAGER_ROWS = 4096
"""Blocks per slice of the eager step: bounds its fp32 temporaries to a few MB each."""

# Inductor stores an intermediate that took many operations or reads, here a full-size fp32 copy of the update
# and one more pass over memory. Computing it again costs less: the step must stay one loop over each block.
_NEVER_STORE: dict[str, Any] = dict.fromkeys(
    ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"), 10_000
)

BlockStep = Callable[..., None]


class StepFunction:
    """`step(theta, g, scalars, *parts)` for one rule and one codec per state; updates in place.

    `theta` and `g`: [blocks, BLOCK], any float dtype, blocks >= 2 (the compiler would make a special case of 1);
    `scalars`: fp32 [k], in the order of `rule.scalars()`; `parts`: the codecs' tensors in order of the states.
    """

    def __init__(self, rule: type[Rule], names: tuple[str, ...], codecs: tuple[type[Codec], ...]) -> None:
        self.name = "_".join([rule.__name__, *(codec.name for codec in codecs)])
        self.eager = _block_step(rule, names, codecs, self.name)
        self._compiled: BlockStep | None = None
        self.fallback_reason: str | None = None

    def __call__(self, compiled: bool, theta: Tensor, g: Tensor, scalars: Tensor, *parts: Tensor) -> None:
        if compiled and self.fallback_reason is None:
            for tensor in (theta, g, *parts):
                torch._dynamo.mark_dynamic(tensor, 0)
            if self._compiled is None:
                self._compiled = torch.compile(self.eager, fullgraph=True, options=_NEVER_STORE)
            try:
                return self._compiled(theta, g, scalars, *parts)
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
        for start in range(0, theta.shape[0], EAGER_ROWS):
            rows = slice(start, start + EAGER_ROWS)
            self.eager(theta[rows], g[rows], scalars, *(part[rows] for part in parts))
        return None


@functools.cache
def step_function(rule: type[Rule], names: tuple[str, ...], codecs: tuple[type[Codec], ...]) -> StepFunction:
    """The one StepFunction of this rule and these codecs, shared by all optimizers of the process."""
    return StepFunction(rule, names, codecs)


def _block_step(rule: type[Rule], names: tuple[str, ...], codecs: tuple[type[Codec], ...], title: str) -> BlockStep:
    def step(theta: Tensor, g: Tensor, scalars: Tensor, *parts: Tensor) -> None:
        stored, held = iter(parts), []
        for codec in codecs:
            held.append(tuple(next(stored) for _ in codec.parts))
        states = [codec.decode(*tensors) for codec, tensors in zip(codecs, held, strict=True)]
        named = dict(zip(names, scalars.unbind(), strict=True))
        new_theta, *new_states = rule.update(theta.float(), g.float(), *states, **named)
        theta.copy_(new_theta)
        for codec, tensors, state in zip(codecs, held, new_states, strict=True):
            for target, source in zip(tensors, codec.encode(state), strict=True):
                target.copy_(source)

    # A code object of its own: the compiler counts recompilations per code object, and all rules share `step`.
    code = step.__code__.replace(co_name=title)
    return FunctionType(code, step.__globals__, title, step.__defaults__, step.__closure__)


def _compiler_errors() -> tuple[type[Exception], ...]:
    import torch._dynamo.exc as dynamo
    import torch._inductor.exc as inductor

    return (dynamo.TorchDynamoException, inductor.InvalidCxxCompiler, inductor.CppCompileError)
