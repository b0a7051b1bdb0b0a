"""Next-token cross-entropy, with or without ever building the full logits.

The loss is computed inside the forward of the head itself: under ZeRO-3 DeepSpeed gathers a module's weights
when that module's forward and backward run, so nothing outside it may touch ``head.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from toolkit.models.products import products

LOSSES = ("chunked", "plain")

# Architectures whose logits are exactly head(last hidden state): others scale or cap them on the way out.
CHUNKABLE = frozenset(
    {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "llama", "mistral", "mixtral", "gemma", "gpt2", "gpt_neox"}
)

CHUNK = {"cuda": 4096, "cpu": 1024}
"""Entries of the vocabulary whose logits exist at a time: enough to keep a GPU busy, few enough for a CPU's caches."""

MANY = 2**15
"""Tokens from which on fewer entries do, so that there are never more than MANY times CHUNK logits."""

_NARROWEST = 128
"""Entries at least, and of which a chunk is a multiple where it is narrowed: what products on a GPU are cut into."""


def chunk_of(device: str, tokens: int, vocabulary: int) -> int:
    """Entries of the vocabulary whose logits exist at a time for so many tokens."""
    chunk = CHUNK[device]
    if tokens > MANY:
        chunk = max(_NARROWEST, chunk * MANY // tokens // _NARROWEST * _NARROWEST)
    return min(chunk, vocabulary)


IGNORED = -100
"""The target of a token that is not predicted, as in torch's and transformers' losses; only where some may be."""


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T + bias``, over the vocabulary in chunks.

    With z the logits [tokens, vocab], computed in fp32 and one chunk at a time, and y the targets:

        forward:   lse = log sum_v exp(z_v),      loss = mean(lse - z_y)
        backward:  p = exp(z - lse) - onehot(y),  s = d loss / tokens
                   d hidden = s p @ weight,  d weight = s p.T @ hidden,  d bias = s sum_tokens p

    z is computed again in the backward pass, which is also when fp16's loss scale is there. A chunk holds all tokens,
    so its rows of d weight are whole after one product: summed in fp32 and rounded once. Where `some` tokens only are
    predicted, the others have lse = infinity, so that p = 0, and `tokens` is the number of those that are.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, device: str, some: bool
    ) -> Tensor:
        operand, multiply = products(device, hidden.dtype)
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        chunk = chunk_of(device, tokens, vocabulary)
        x = hidden.to(operand)
        buffers = [hidden.new_empty(tokens * chunk, dtype=torch.float32) for _ in range(2)]
        normaliser = hidden.new_full((tokens,), -math.inf, dtype=torch.float32)
        # What is not in the vocabulary is in no chunk: its loss and gradients are NaN.
        chosen = torch.full_like(normaliser, math.nan)
        for rows in _chunks(vocabulary, chunk):
            logits, logarithms = (_shaped(buffer, tokens, rows.stop - rows.start) for buffer in buffers)
            multiply(x, weight[rows].to(operand).t(), logits)
            if bias is not None:
                logits += bias[rows]
            # In one pass, where logsumexp takes four.
            torch.log_softmax(logits, 1, out=logarithms)
            normaliser = torch.logaddexp(normaliser, logits[:, 0] - logarithms[:, 0])
            column, inside = _place(targets, rows)
            chosen = torch.where(inside, logits.gather(1, column)[:, 0], chosen)
        losses = normaliser - chosen
        normaliser = normaliser + 0 * chosen
        ctx.device, count = device, None
        if some:
            left_out = targets == IGNORED
            losses, normaliser = losses.masked_fill(left_out, 0), normaliser.masked_fill(left_out, math.inf)
            count = (tokens - left_out.sum()).clamp(min=1)
        ctx.save_for_backward(hidden, weight, targets, bias, normaliser, count)
        return losses.mean() if count is None else losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, normaliser, count = ctx.saved_tensors
        operand, multiply = products(ctx.device, hidden.dtype)
        (tokens, features), vocabulary = hidden.shape, weight.shape[0]
        for_hidden, for_weight, _, for_bias, *_ = ctx.needs_input_grad
        # p in fp16 would lose what is below 6e-8. As the factor comes after the products, 1 / tokens is not rounded to
        # bf16 with p, where all targets would be off by the same.
        one = 2.0**15 if operand == torch.float16 else 1.0
        factor = gradient.float() / ((tokens if count is None else count) * one)
        shift = (normaliser - math.log(one))[:, None]
        chunk = chunk_of(ctx.device, tokens, vocabulary)
        x = hidden.to(operand)
        wide = hidden.new_empty(max(tokens * chunk, min(tokens, MANY) * features), dtype=torch.float32)
        narrow = None if operand == torch.float32 else hidden.new_empty(tokens * chunk)
        of_hidden = hidden.new_zeros(tokens, features, dtype=torch.float32) if for_hidden else None
        of_weight = torch.empty_like(weight) if for_weight else None
        of_bias = torch.empty_like(bias) if for_bias else None
        for rows in _chunks(vocabulary, chunk):
            size = rows.stop - rows.start
            w = weight[rows].to(operand)
            p = _shaped(wide, tokens, size)
            multiply(x, w.t(), p)
            if bias is not None:
                p += bias[rows]
            p.sub_(shift).exp_()
            column, inside = _place(targets, rows)
            p.scatter_(1, column, p.gather(1, column) - one * inside[:, None])
            if of_bias is not None:
                of_bias[rows] = p.sum(0) * factor
            if narrow is not None:
                p = _shaped(narrow, tokens, size).copy_(p)
            if of_weight is not None:
                part = hidden.new_empty(size, features, dtype=torch.float32)
                multiply(p.t(), x, part)
                of_weight[rows] = part.mul_(factor)
                del part
            if of_hidden is not None and narrow is None:
                of_hidden.addmm_(p, w)
            elif of_hidden is not None:
                for some in _chunks(tokens, max(1, wide.numel() // features)):
                    part = _shaped(wide, some.stop - some.start, features)
                    multiply(p[some], w, part)
                    of_hidden[some] += part
        if of_hidden is not None:
            of_hidden = of_hidden.mul_(factor).to(hidden.dtype)
        return of_hidden, of_weight, None, of_bias, None, None


def _chunks(vocabulary: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, vocabulary)) for start in range(0, vocabulary, chunk))


def _shaped(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _place(targets: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Columns of `targets` in the chunk `rows`, int64 [tokens, 1], and whether they are in it at all, bool [tokens]."""
    column = targets - rows.start
    nearest = column.clamp(0, rows.stop - rows.start - 1)
    return nearest[:, None], nearest == column


def plain_loss(logits: Tensor, targets: Tensor, some: bool = False) -> Tensor:
    """Mean cross-entropy, 0-d fp32: logits [micro_batch, seq_len, vocab], targets int64 [micro_batch, seq_len].

    `some`: targets may be IGNORED, and do not count then; of none the loss is 0.
    """
    if not some:
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    device: str | None = None,
    some: bool = False,
) -> Tensor:
    """Mean cross-entropy of the logits ``hidden @ weight.T + bias``, 0-d fp32; one chunk of them exists at a time.

    Args:
        hidden: [tokens, hidden_size], bf16, fp16 or fp32.
        weight: [vocab, hidden_size], of the same dtype.
        targets: int64 [tokens]. One that is not in the vocabulary makes the loss and all its gradients NaN.
        bias: [vocab] or None.
        device: "cpu" or "cuda", whose products are to be used; default: that which `hidden` is on.
        some: targets may be IGNORED, and do not count then; of none the loss is 0.

    Beside its inputs and the gradients it holds at most, in bytes, with c = CHUNK of the device, and less from MANY
    tokens on (`chunk_of`), where tokens c stays MANY CHUNK:

        forward    8 tokens c
        backward   2 tokens c + 4 max(tokens c, min(tokens, MANY) hidden_size) + 4 tokens hidden_size + 4 c hidden_size

    and on a CPU, for 16-bit operands, what a product needs: 6 bytes for each element of its result where the CPU has
    fast bf16 products, else fp32 copies of `hidden` and of a chunk of `weight`.

    The relative error (L2) of the gradients is that of rounding them once and p once, below 0.3 % in bf16. The same
    inputs give the same bits.
    """
    return _CrossEntropy.apply(hidden, weight, targets, bias, device or hidden.device.type, some)


class LossHead(nn.Linear):
    """A vocabulary head that returns the loss when it is given targets, and logits when it is not."""

    stands_for: str | None = None
    """The device whose products are to be used, where that is not the one the weights are on: in a dry run."""

    @classmethod
    def adopt(cls, head: nn.Linear) -> LossHead:
        """Turn `head` itself into a LossHead: same module, same parameters, same names."""
        head.__class__ = cls
        assert isinstance(head, cls)
        return head

    def forward(self, hidden: Tensor, targets: Tensor | None = None, some: bool = False) -> Tensor:
        """`hidden` [micro_batch, seq_len, hidden_size], `targets` int64 [micro_batch, seq_len] -> 0-d fp32."""
        if targets is None:
            return super().forward(hidden)
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.weight, targets.flatten(), self.bias, self.stands_for, some
        )
