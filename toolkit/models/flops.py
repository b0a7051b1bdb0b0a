"""Floating-point operations of training from a model's shapes, and what a device can do of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Products of dense bf16 (or fp16) matrices a second, without sparsity, from the makers' data sheets: NVIDIA A100, A10,
# A40, L4, L40S, H100, H200, Grace Hopper and HGX B200, AMD MI300X. By the name that torch gives the device.
_PEAKS = {
    r"NVIDIA A100.*": 312e12,
    r"NVIDIA A10": 125e12,
    r"NVIDIA A40": 149.7e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA H100 \d+GB HBM\w+": 989.4e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 NVL": 835e12,
    r"NVIDIA H200": 989.4e12,
    r"NVIDIA GH200 .*": 989.4e12,
    r"NVIDIA B200": 2250e12,
    r"AMD Instinct MI300X.*": 1307.4e12,
}


def flops_per_token(config: PretrainedConfig, seq_len: int, frozen: bool = False) -> int:
    """Operations that training needs for a token: 2 for each weight of a matrix in the forward pass and 4 in the
    backward pass, the head's once even where it is tied, and 12 * layers * heads * head size * tokens attended to.

    As in PaLM's paper (appendix B): attention is counted as if it were not causal; what activation checkpointing or a
    chunked loss computes again, embeddings, norms and the optimizer's step are not counted. Of experts, those are
    counted that a token passes through. Weights that are `frozen` need 4, without a gradient of their own, and adapters
    beside them are not counted.
    """
    from torch import nn

    from toolkit.models.build import skeleton

    model = skeleton(config)
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    weights = float(head.weight.numel()) if head is not None and id(head.weight) in looked_up else 0.0
    share = _share_of_experts(config)
    experts = _experts(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and id(weight) not in looked_up:
            one_of_many = ".experts." in name or (weight.dim() == 3 and weight.shape[0] == experts)
            weights += weight.numel() * (share if one_of_many else 1.0)
    return round((4 if frozen else 6) * weights + 12 * _attended(config, seq_len))


def _experts(config: PretrainedConfig) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((count for name in names if (count := getattr(config, name, None))), 1)


def _share_of_experts(config: PretrainedConfig) -> float:
    experts = _experts(config)
    return float(getattr(config, "num_experts_per_tok", None) or experts) / float(experts)


def _attended(config: PretrainedConfig, seq_len: int) -> int:
    """Over all layers: heads * head size * tokens that a token is compared with."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = min(seq_len, getattr(config, "sliding_window", None) or seq_len)
    tokens = {"full_attention": seq_len, "sliding_attention": window}
    return sum(width * tokens.get(kind, 0) for kind in kinds)


def peak_flops(device_name: str) -> float | None:
    """What the device can do of dense bf16 products a second; None where that is not known, as of a part of a GPU."""
    if "MIG" in device_name:
        return None
    return next((peak for name, peak in _PEAKS.items() if re.fullmatch(name, device_name)), None)
