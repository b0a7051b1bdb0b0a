"""Attention and the chunked loss on the meta device: the kernels that a device would choose, and what they hold."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend


@contextmanager
def attention_of(device: str) -> Iterator[None]:
    """Lets `scaled_dot_product_attention` be the kernel that `device` would choose.

    In place of torch's own function: a torch function mode would not be there while layers are computed again.
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = functools.partial(_attend, device)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _attend(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten = torch.ops.aten
    if device == "cpu" and _cpu_has_flash(query, key, value, attn_mask, is_causal, enable_gqa):
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        result: Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return result
    half = query.dtype in (torch.bfloat16, torch.float16)
    if device == "cuda" and half and attn_mask is None and query.shape[-1] <= 256:
        result = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return result
    if device == "cuda" and not enable_gqa:
        efficient = aten._scaled_dot_product_efficient_attention
        result = efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
        return result
    math = aten._scaled_dot_product_attention_math
    result = math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    return result


def _cpu_has_flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> bool:
    """Asks torch, with tensors of a few positions: the choice does not depend on how many there are."""
    # Real tensors, and only here: whatever is alive in the rehearsal is on the meta device.
    with torch.utils._python_dispatch._disable_current_modes():
        return _flash_is_chosen(query, key, value, mask, is_causal, enable_gqa)


def _flash_is_chosen(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> bool:
    few = [torch.empty(1, x.shape[1], 2, x.shape[3], dtype=x.dtype, requires_grad=True) for x in (query, key, value)]
    small = None if mask is None else torch.ones(1, 1, 2, 2, dtype=mask.dtype)
    choose: Any = torch._fused_sdp_choice
    choice = choose(*few, small, 0.0, is_causal, enable_gqa=enable_gqa)
    return bool(choice == SDPBackend.FLASH_ATTENTION.value)


class ChunkedLoss(torch.autograd.Function):
    """The memory of a chunked loss: hidden [tokens, hidden_size], weight [vocab, hidden_size] -> [tokens]."""

    @staticmethod
    def of(kernel: Any, device: str) -> Any:
        """Stands for `kernel`, one of `toolkit.models.loss`, on `device`."""
        eager_gradients = kernel.__name__ == "_liger_kernel"

        def rehearsed(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
            losses: Tensor = ChunkedLoss.apply(hidden, weight, targets, bias, device, eager_gradients)
            return losses.float().mean()

        return rehearsed

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, device: str, early: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden.detach(), weight.detach(), targets, bias.detach() if bias is not None else None)
        ctx.device, ctx.early = device, _on_gpu(hidden, weight, True) if early else None
        if not early:
            _chunks(device, hidden, weight, targets, bias, None)
        return hidden.new_empty(hidden.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias = ctx.saved_tensors
        found = ctx.early or _chunks(ctx.device, hidden, weight, targets, bias, gradient)
        return found[0], found[1], None, None if bias is None else torch.empty_like(bias), None, None


def _chunks(
    device: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, gradient: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What torch's linear_cross_entropy allocates; with `gradient`, also the gradients of hidden and weight."""
    if device == "cuda":
        return _on_gpu(hidden, weight, gradient is not None)
    from torch.nn.modules import linear_cross_entropy as torch_loss

    options = nn.LinearCrossEntropyOptions(batch_chunk_size=256)._adjust(
        num_batches=hidden.shape[0],
        in_features=hidden.shape[1],
        num_classes=weight.shape[0],
        dtype=hidden.dtype,
        device=torch.device("cpu"),
    )
    # torch's own Python, run on the meta device.
    found = torch_loss._linear_cross_entropy_batch_chunked_accumulator(
        hidden,
        weight,
        targets,
        bias,
        None,
        "none",
        -100,
        0.0,
        options.batch_chunk_size,
        options.acc_policy,
        options.acc_dtype,
        gradient is not None,
        gradient is not None,
        gradient is not None and bias is not None,
        loss_grad_output=gradient,
    )
    return found[1], found[2]


def _on_gpu(hidden: Tensor, weight: Tensor, gradients: bool) -> tuple[Tensor | None, Tensor | None]:
    """torch/nn/modules/linear_cross_entropy.py, policy "compact" on CUDA: fp32 logits of a chunk of tokens."""
    tokens, features = hidden.shape
    vocabulary = weight.shape[0]
    wide = -(-vocabulary // features)
    chunk = max(1, min((1 << (-(-tokens // wide) - 1).bit_length()) // 2, tokens))
    logits = hidden.new_empty(chunk, vocabulary, dtype=torch.float32)
    if not gradients:
        return None, None
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)
    narrow = logits.to(hidden.dtype)
    inputs = hidden.new_empty(chunk, features, dtype=torch.float32)
    del logits, narrow, inputs
    return of_hidden, of_weight
