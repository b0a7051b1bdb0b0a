"""Gated MLPs that run on some tokens at a time: ``down(act(gate(x)) * up(x))``, one tile of rows of x after the other.

Untiled, an MLP keeps four tensors [tokens, intermediate_size] between its passes, and makes four more in the backward
pass. Here the input alone is kept, and what exists is of one tile:

    8 TILE intermediate_size elements,

and where there are several tiles, in the backward pass, the fp32 sums of the three weight gradients, 12 hidden_size
intermediate_size bytes, and for 16-bit weights a product on its way into them, 4 hidden_size intermediate_size bytes.

The backward pass runs the first two products of each tile again. Under activation checkpointing that is all that is
computed again of the MLP: the block's second forward pass ends where the input is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from toolkit.models.products import products

TILE = 4096
"""Tokens at most. For each element of a weight gradient's sum a tile computes 2 operations with each of its rows and
moves 16 bytes: where a GPU does 300 operations in the time of a byte, computing takes longer from 2,400 rows on,
whatever the sizes of the model. The products with weights need fewer."""

_ROWS = 64
"""A tile's rows are a multiple of these, but for the last one's: what products on a GPU are cut into."""

Activation = Callable[[Tensor], Tensor]


class TiledMLP(nn.Module):
    """An MLP of transformers with `gate_proj`, `up_proj`, `down_proj` and `act_fn`, turned into one that runs in tiles.

    Its submodules are never called, which ZeRO-3 must know to gather their weights in time: it is a leaf module.
    """

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: Activation
    stands_for: str | None = None
    """The device whose products are to be used, where that is not the one the weights are on: in a dry run."""

    @staticmethod
    def fits(module: nn.Module | None) -> bool:
        """Whether `module` has the parts of such an MLP, and no others."""
        parts = dict(module.named_children()) if module is not None else {}
        linear = [type(parts.pop(name, None)) is nn.Linear for name in ("gate_proj", "up_proj", "down_proj")]
        return all(linear) and list(parts) == ["act_fn"] and not any(True for _ in parts["act_fn"].parameters())

    @classmethod
    def adopt(cls, module: nn.Module) -> None:
        """Turn `module` itself into a TiledMLP: same module, same parameters, same names."""
        from deepspeed.utils import set_z3_leaf_module

        module.__class__ = cls
        set_z3_leaf_module(module, True)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., hidden_size] -> the same shape."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        weights = [layer.weight for layer in layers] + [layer.bias for layer in layers]
        rows = x.reshape(-1, x.shape[-1])
        # Saved before anything is computed: what checkpointing computes again ends with what is saved last.
        kept = _Kept.apply(rows, *weights)
        result: Tensor = _Tiled.apply([kept], self.act_fn, self.stands_for or x.device.type, rows, *weights)
        return result.view(x.shape)


class _Kept(torch.autograd.Function):
    """Saves tensors as autograd does, with its hooks and checks, for whoever keeps the result, which is empty."""

    @staticmethod
    def forward(*tensors: Tensor | None) -> Tensor:
        assert tensors[0] is not None
        return tensors[0].new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise AssertionError("nothing is computed from the result")


class _Tiled(torch.autograd.Function):
    """The MLP, with x [tokens, hidden_size] in tiles of rows.

        forward:   g = x gate.T,  u = x up.T,  h = act(g) u,  y = h down.T              (and biases)
        backward:  d h = d y down,  d g and d u by autograd from h,  d x = d g gate + d u up
                   d gate = sum d g.T x,  d up = sum d u.T x,  d down = sum d y.T h     (sums over tiles, in fp32)

    A gradient is rounded and handed over once, whole: ZeRO's hooks see it once.
    """

    @staticmethod
    def forward(
        ctx: Any, kept: list[Tensor], act: Activation, device: str, x: Tensor, *weights: Tensor | None
    ) -> Tensor:
        ctx.kept, ctx.act, ctx.device = kept, act, device
        gate, up, down, *biases = weights
        assert gate is not None and up is not None and down is not None
        y = torch.empty_like(x)
        for rows in _tiles(x.shape[0]):
            h = act(F.linear(x[rows], gate, biases[0]))
            h = h * F.linear(x[rows], up, biases[1])
            y[rows] = F.linear(h, down, biases[2])
            del h
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.kept:
            raise RuntimeError("a second backward pass through a tiled MLP: what it kept is freed by the first one")
        x, gate, up, down, *biases = ctx.kept.pop().grad_fn.saved_tensors
        needed = ctx.needs_input_grad[3:]
        tiles = list(_tiles(x.shape[0]))
        of_x = torch.empty_like(x) if needed[0] else None
        sums = [
            _Sum(weight, ctx.device, needs, alone=len(tiles) == 1)
            for weight, needs in zip((gate, up, down, *biases), needed[1:], strict=True)
        ]
        for rows in tiles:
            some, given = x[rows], gradient[rows]
            g, u = F.linear(some, gate, biases[0]), F.linear(some, up, biases[1])
            with torch.enable_grad():
                h = ctx.act(g.requires_grad_()) * u.requires_grad_()
            sums[2].add(given, h.detach())
            sums[5].add_rows(given)
            # Frees what `h` keeps as it goes.
            of_g, of_u = torch.autograd.grad(h, (g, u), given @ down)
            del g, u, h
            for place, part in ((0, of_g), (1, of_u)):
                sums[place].add(part, some)
                sums[place + 3].add_rows(part)
            if of_x is not None:
                of_x[rows] = torch.addmm(of_g @ gate, of_u, up)
            del of_g, of_u, part
        return None, None, None, of_x, *(one.result() for one in sums)


class _Sum:
    """The gradient of `weight` (None: there is none) as a sum over tiles, in fp32 unless it is of one tile `alone`."""

    def __init__(self, weight: Tensor | None, device: str, needed: bool, *, alone: bool) -> None:
        self._weight, self._needed, self._alone = weight, needed and weight is not None, alone
        self._total: Tensor | None = None
        if self._needed:
            assert weight is not None
            self._operand, self._multiply = products(device, weight.dtype)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add ``a.T @ b``."""
        if not self._needed:
            return
        if self._alone:
            self._total = a.t() @ b
            return
        a, b = a.to(self._operand), b.to(self._operand)
        if self._total is None:
            self._total = a.new_empty(a.shape[1], b.shape[1], dtype=torch.float32)
            self._multiply(a.t(), b, self._total)
        elif self._operand == torch.float32:
            self._total.addmm_(a.t(), b)
        else:
            part = torch.empty_like(self._total)
            self._multiply(a.t(), b, part)
            self._total += part

    def add_rows(self, a: Tensor) -> None:
        """Add the rows of `a`."""
        if self._needed:
            rows = a.sum(0, dtype=torch.float32)
            self._total = rows if self._total is None else self._total + rows

    def result(self) -> Tensor | None:
        """The gradient in the dtype of the weight; the sum is let go."""
        total, self._total = self._total, None
        return total if total is None or self._weight is None else total.to(self._weight.dtype)


def _tiles(tokens: int) -> Iterator[slice]:
    """Rows of each tile, as even as `_ROWS` allows."""
    size = math.ceil(tokens / max(1, math.ceil(tokens / TILE)) / _ROWS) * _ROWS
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, max(1, size)))
