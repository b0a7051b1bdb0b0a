"""Attention on the meta device: the kernel that a device would choose."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
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
    # Real tensors, and only here: what is alive in the dry run is on the meta device.
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
