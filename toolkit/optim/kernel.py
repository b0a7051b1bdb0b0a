"""The optimizer step on blocks: decode -> rule -> encode, one function, compiled or eager.

Inductor makes it one Triton kernel on a GPU and one vectorised, threaded C++ loop on a CPU. The same source runs
eagerly as reference and fallback. The number of blocks is dynamic: one graph serves every size.

Where a code takes 4 bits, lane i of a block shares a byte with lane i + BLOCK/2; of 2 bits, with three others. The
function then gets the halves (quarters) of every block as tensors of their own and works on all at once, so that
packing is elementwise too: written on whole blocks, it would be a second loop with an intermediate of full size.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from toolkit.optim.inductor import BlockStep, Launch, compile_blocks, first_of_all
from toolkit.optim.kept import ours
from toolkit.optim.rule import Rule
from toolkit.state.codecs import BLOCK, decode_halves, encode_halves, pack, parts_of, unpack
from toolkit.state.files import bring_in, let_go, read_ahead
from toolkit.state.layout import Layout
from toolkit.state.remainders import rounding_phase, thresholds

logger = logging.getLogger("toolkit")

LAUNCH = Launch()
"""How a GPU runs the kernel of every StepFunction made from now on."""

PATIENCE_SECONDS = 10.0
"""After so long the first call says that it compiles; what is in the compiler's cache takes less."""

EAGER_ROWS = {"cpu": 2**12}
"""Blocks per slice of the eager step, by kind of device. It bounds the temporaries, which take up to 56 bytes for each
element of a slice: 59 MB on a CPU."""

EAGER_ROWS_ELSEWHERE = 2**14
"""On a GPU a slice must be worth the launches of a hundred kernels; temporaries take up to 235 MB."""

COMPILED_ROWS = 2**22
"""Blocks per call of the compiled step: their 2^30 elements have 32-bit indices, on which the kernel counts."""

CPU_ROWS = 2**16
"""The same on a CPU, whose kernel has temporaries of a few numbers for each block: 3 MB."""

LARGEST_GRADIENT = 2.0**63
"""A larger element of a gradient counts as none, so that squares, which second moments add up, are finite."""


class StepFunction:
    """One step of one rule on tensors of one layout, in place. `rounds`: weights are rounded stochastically.

    `function` names one of the rule's measuring functions, instead of `update`: it changes no weights and no state, and
    fills what comes behind the stored tensors in `parts`. `wide` is by each of those whether it has a value for every
    lane, else it is [blocks, 1]: the results, a sum over each block for those that have not; if there is such a one,
    how many lanes of each block count, fp32; then what `Rule.given` names, single numbers first. For `update` only the
    last are there.
    """

    def __init__(self, rule: type[Rule], names: tuple[str, ...], layout: Layout, function: str = "update") -> None:
        self.rule, self.names, self.layout = rule, names, layout
        self.numbers, self.spread = rule.given(function)
        self.results = () if function == "update" else measured_by_element(rule, function)
        counts = not all(self.results)
        self.wide = (
            *self.results,
            *([False] if counts else []),
            *(False for _ in self.numbers),
            *(True for _ in self.spread),
        )
        stored = [codec.name for codec in layout.codecs] + ([layout.remainder.name] if layout.remainder else [])
        self.name = "_".join([rule.__name__, *([] if function == "update" else [function]), *stored])
        bits = [codec.bits for codec in layout.codecs] + ([layout.remainder.bits] if layout.remainder else [])
        self._lanes = BLOCK // parts_of(bits)
        given = self.numbers + self.spread
        self.rounds = function == "update" and layout.remainder is not None and layout.remainder.bits < 16
        if function == "update":
            self.eager = _block_step(rule, names, given, layout)
        else:
            self.eager = _block_measure(rule, function, names, given, layout, self.results)
        self._launch = LAUNCH
        self._compiled: dict[tuple[torch.device, torch.dtype, torch.dtype], BlockStep | None] = {}
        self.fallback_reason: str | None = None
        self._key: str | None = None  # of one that others could have changed, nothing is kept on disk
        if ours(rule, *(type(codec) for codec in layout.codecs)):
            codecs = [(type(codec), vars(codec)) for codec in layout.codecs]
            self._key = f"{rule} {function} {names} {layout} {codecs}"

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
            compiled: as Inductor compiles it, where that works.
            theta: weights, [blocks, BLOCK], blocks >= 2 (the compiler counts on that).
            g: gradient, same shape, any float dtype.
            scalars: fp32 [k], in the order of `rule.scalars()`.
            scale: fp32, 0-d; multiplies the gradient.
            parts: one tensor for each of `layout.specs`, of as many blocks, and what `wide` says.
            rounding: seed, optimizer step and number of the first block in its parameter group.
        """
        run = self._prepare(theta, g, scalars, scale, parts) if compiled else None
        most = EAGER_ROWS.get(theta.device.type, EAGER_ROWS_ELSEWHERE)
        if run:
            most = min(COMPILED_ROWS, CPU_ROWS) if theta.device.type == "cpu" else COMPILED_ROWS
        if theta.shape[0] <= most:
            bring_in(parts)
            (run or self.eager)(*self._inputs(theta, g, parts), scalars, scale, self._phase(theta, rounding))
            let_go(parts)
            return
        seed, step, block = rounding
        slices = _slices(theta.shape[0], most)
        for rows, following in zip(slices, [*slices[1:], slice(0)], strict=True):
            held = [part[rows] for part in parts]
            bring_in(held)
            read_ahead(part[following] for part in parts)
            inputs = self._inputs(theta[rows], g[rows], held)
            phase = self._phase(theta, (seed, step, block + rows.start))
            (run or self.eager)(*inputs, scalars, scale, phase)
            let_go(held)

    def _prepare(
        self, theta: Tensor, g: Tensor, scalars: Tensor, scale: Tensor, parts: Sequence[Tensor]
    ) -> BlockStep | None:
        """The step compiled for tensors like these, or None where it runs eagerly.

        Nothing runs before it is compiled and loaded, so whatever fails in here, the eager step starts from untouched
        tensors. What fails later, in a launch, may have written: that is no case for another try.
        """
        kind = (theta.device, theta.dtype, g.dtype)
        if kind not in self._compiled:
            try:
                rest = (scalars, scale, self._phase(theta, (0, 0, 0)))
                with _patience(self.name), first_of_all(f"{self.name} {kind}"):
                    inputs = self._inputs(theta, g, parts)
                    self._compiled[kind] = compile_blocks(self.eager, inputs, rest, self._launch, self._key)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the compilers below raise many kinds
                self._compiled[kind] = None
                lines = str(error).strip().splitlines() or [type(error).__name__]
                self.fallback_reason = lines[0]
                logger.warning(
                    "%s runs eagerly, with the same numbers but slower and with more temporary memory, because "
                    "compiling it failed: %s",
                    self.name,
                    self.fallback_reason,
                )
        return self._compiled[kind]

    def _inputs(self, theta: Tensor, g: Tensor, parts: Sequence[Tensor]) -> list[list[Tensor]]:
        # Scales and what is packed most are taken whole, what has a value for every lane in parts.
        lanes = self._lanes
        return [list(x.split(lanes, dim=1)) if x.shape[1] > lanes else [x] for x in (theta, g, *parts)]

    def _phase(self, theta: Tensor, rounding: tuple[int, int, int]) -> Tensor | None:
        return torch.full((), float(rounding_phase(*rounding)), device=theta.device) if self.rounds else None


def _slices(rows: int, most: int) -> list[slice]:
    """Cuts of `rows` blocks into as few parts of `most` at most as it takes, all of about one size."""
    count = -(-rows // most)
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


@functools.cache
def step_function(rule: type[Rule], names: tuple[str, ...], layout: Layout, function: str = "update") -> StepFunction:
    """The one StepFunction of these, shared by all optimizers of the process."""
    return StepFunction(rule, names, layout, function)


def measured_by_element(rule: type[Rule], function: str) -> tuple[bool, ...]:
    """Of each result of a measuring function, whether every element is wanted, and not the sum over each block."""
    means = rule.passes().get(function)
    return tuple(mean.over in ("row", "column") for mean in means) if means is not None else (True,)


class _Opened:
    """What a step is given, decoded: lists of halves, as fp32 (weights that are fp64 stay so)."""

    def __init__(self, layout: Layout, scale: Tensor, theta: Any, g: Any, parts: Sequence[Any]) -> None:
        codecs, remainder = layout.codecs, layout.remainder
        place = {state.name: index for index, state in enumerate(layout.states)}
        # By state, the one that its codes are relative to.
        self.anchors = [
            place[state.residual_of] if codec.relative and state.residual_of is not None else None
            for state, codec in zip(layout.states, codecs, strict=True)
        ]
        stored = iter(parts)
        self.held = [[next(stored) for _ in codec.specs()] for codec in codecs]
        self.low = [next(stored) for _ in remainder.specs()] if remainder is not None else []
        self.rest = list(stored)
        self.states = [decode_halves(codec, *tensors) for codec, tensors in zip(codecs, self.held, strict=True)]
        for index, anchor in enumerate(self.anchors):
            if anchor is not None:
                self.states[index] = [x + base for x, base in zip(self.states[index], self.states[anchor], strict=True)]
        self.weights = [_at_least_fp32(half) for half in theta]
        if remainder is not None:
            low = [unpack(self.low[0])] if remainder.bits == 4 else self.low
            self.weights = [remainder.join(*half) for half in zip(theta, *low, strict=True)]
        self._g, self._scale = g, scale

    def arguments(self, i: int) -> tuple[Tensor, ...]:
        """Weights, gradient and states of half `i`."""
        weights = self.weights[i]
        g = _bounded(self._g[i].to(weights.dtype) * self._scale)
        return (weights, g, *(state[i] for state in self.states))


def _block_step(rule: type[Rule], names: tuple[str, ...], given: tuple[str, ...], layout: Layout) -> BlockStep:
    codecs, remainder = layout.codecs, layout.remainder
    update: Any = rule.update

    def step(*inputs: Any) -> None:
        theta, g, *parts = inputs[:-3]
        scalars, scale, phase = inputs[-3:]
        named = dict(zip(names, scalars.unbind(), strict=True))
        opened = _Opened(layout, scale, theta, g, parts)
        results = []
        for i in range(len(theta)):
            found = _half(i, given, opened.rest)
            given_here = opened.arguments(i)
            results.append([_own(x, given_here) for x in update(*given_here, **named, **found)])
        new_theta, *new_states = (list(halves) for halves in zip(*results, strict=True))

        for index, codec in enumerate(codecs):
            halves, anchor = [half.float() for half in new_states[index]], opened.anchors[index]
            if anchor is not None:
                halves = [x - base.float() for x, base in zip(halves, new_states[anchor], strict=True)]
            for target, source in zip(opened.held[index], encode_halves(codec, halves), strict=True):
                _write(target, source)
        if remainder is None:
            _write(theta, new_theta)
            return
        cut, lane = [], 0
        for half in new_theta:
            rows, lanes = half.shape
            cut.append(remainder.split(half, None if phase is None else thresholds(phase, rows, lane, lanes)))
            lane += lanes
        written, *rest_parts = zip(*cut, strict=True)
        _write(theta, written)
        for target, new_rests in zip(opened.low, rest_parts, strict=True):
            _write(target, pack(new_rests) if remainder.bits == 4 else new_rests)

    return step


def _block_measure(
    rule: type[Rule],
    function: str,
    names: tuple[str, ...],
    given: tuple[str, ...],
    layout: Layout,
    by_element: tuple[bool, ...],
) -> BlockStep:
    call = getattr(rule, function)

    def measure(*inputs: Any) -> None:
        theta, g, *parts = inputs[:-3]
        scalars, scale, _ = inputs[-3:]
        named = dict(zip(names, scalars.unbind(), strict=True))
        opened = _Opened(layout, scale, theta, g, parts)
        targets, others = opened.rest[: len(by_element)], opened.rest[len(by_element) :]
        lanes = None if all(by_element) else others.pop(0)[0]
        found = []
        for i in range(len(theta)):
            result = call(*opened.arguments(i), **named, **_half(i, given, others))
            found.append((result,) if isinstance(result, Tensor) else tuple(result))
        for target, halves, whole in zip(targets, zip(*found, strict=True), by_element, strict=True):
            if whole:
                _write(target, halves)
            else:
                assert lanes is not None
                _write(target, [_block_sum(halves, lanes)])

    return measure


def _half(i: int, names: Sequence[str], values: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Half `i` of what the names stand for; a number for a whole block is in both."""
    return {name: halves[i % len(halves)] for name, halves in zip(names, values, strict=True)}


def _block_sum(halves: Sequence[Tensor], lanes: Tensor) -> Tensor:
    """The sum over each block of its first `lanes` lanes, [blocks, 1]: what is behind the end of a tensor is no 0."""
    counted, lane = [], 0
    for half in halves:
        place = torch.arange(lane, lane + half.shape[1], device=half.device)
        counted.append(torch.where(place < lanes, half.float(), 0.0))
        lane += half.shape[1]
    # Halves first, then lanes, so that it is one loop over a block.
    return sum(counted[1:], start=counted[0]).sum(dim=1, keepdim=True)


def _at_least_fp32(x: Tensor) -> Tensor:
    """fp64 weights are updated in fp64, from states in fp32."""
    return x if x.dtype == torch.float64 else x.float()


def _bounded(g: Tensor) -> Tensor:
    """`g` with zeros for finite elements beyond LARGEST_GRADIENT; inf becomes NaN and NaN stays: they stay seen.

    A product and not `clamp` or `where`, which cost three times as much.
    """
    return g * (g.abs() <= LARGEST_GRADIENT)


def _own(x: Tensor, given: Sequence[Tensor]) -> Tensor:
    """`x`, computed anew if it is what a rule was given and hands on as something else, like a state that is the one
    before another: it is a stored tensor or a view of one, which may be written before it is read.

    A product with 1, for Inductor takes a copy for superfluous and then reads what has just been written.
    """
    return x * 1.0 if x._is_view() or any(x is one for one in given) else x


def _write(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@contextmanager
def _patience(name: str) -> Iterator[None]:
    """Say, once for each machine, what takes so long when the first call does."""
    words = "compiling the optimizer step %s: about half a minute on two cores; later runs take it from a cache"
    timer = threading.Timer(PATIENCE_SECONDS, logger.warning, (words, name))
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
