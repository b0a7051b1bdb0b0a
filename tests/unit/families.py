"""Architectures of causal language models, and the component that each of their parameters belongs to."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from small_models import SHAPE

SIZES = {
    "vocab_size": 64,
    **SHAPE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}

# Expected components, a line for each kind of parameter: component and regular expression of the whole name.
DECODER = r"""
    embedding  model\.embed_tokens\.weight
    attention  model\.layers\.\d\.self_attn\.[qkvo]_proj\.weight
    norm       model\.layers\.\d\.(input|post_attention)_layernorm\.weight
    norm       model\.norm\.weight
"""
UNTIED = r"""
    head       lm_head\.weight
"""
DENSE = r"""
    ffn        model\.layers\.\d\.mlp\.(gate|up|down)_proj\.weight
"""
QK_NORM = r"""
    norm       model\.layers\.\d\.self_attn\.[qk]_norm\.weight
"""
QKV_BIAS = r"""
    attention  model\.layers\.\d\.self_attn\.[qkv]_proj\.bias
"""
SANDWICH_NORM = r"""
    norm       model\.layers\.\d\.(pre|post)_feedforward_layernorm\.weight
"""
EXPERTS = r"""
    ffn        model\.layers\.\d\.mlp\.gate\.weight
    ffn        model\.layers\.\d\.mlp\.experts\.(gate_up|down)_proj
"""
GPT2 = r"""
    embedding  transformer\.(wte|wpe)\.weight
    norm       transformer\.h\.\d\.ln_[12]\.(weight|bias)
    attention  transformer\.h\.\d\.attn\.(c_attn|c_proj)\.(weight|bias)
    ffn        transformer\.h\.\d\.mlp\.(c_fc|c_proj)\.(weight|bias)
    norm       transformer\.ln_f\.(weight|bias)
"""
GPT_NEOX = r"""
    embedding  gpt_neox\.embed_in\.weight
    norm       gpt_neox\.layers\.\d\.(input|post_attention)_layernorm\.(weight|bias)
    attention  gpt_neox\.layers\.\d\.attention\.(query_key_value|dense)\.(weight|bias)
    ffn        gpt_neox\.layers\.\d\.mlp\.dense_(h_to_4h|4h_to_h)\.(weight|bias)
    norm       gpt_neox\.final_layer_norm\.(weight|bias)
    head       (lm_head|embed_out)\.weight
"""
DEEPSEEK = r"""
    embedding  model\.embed_tokens\.weight
    attention  model\.layers\.\d\.self_attn\.(q_a|q_b|kv_b|o)_proj\.weight
    attention  model\.layers\.\d\.self_attn\.kv_a_proj_with_mqa\.weight
    norm       model\.layers\.\d\.self_attn\.(q_a|kv_a)_layernorm\.weight
    ffn        model\.layers\.0\.mlp\.(gate|up|down)_proj\.weight
    ffn        model\.layers\.1\.mlp\.gate\.weight
    ffn        model\.layers\.1\.mlp\.experts\.(gate_up|down)_proj
    ffn        model\.layers\.1\.mlp\.shared_experts\.(gate|up|down)_proj\.weight
    norm       model\.layers\.\d\.(input|post_attention)_layernorm\.weight
    norm       model\.norm\.weight
    head       lm_head\.weight
"""
GPT_OSS = r"""
    attention  model\.layers\.\d\.self_attn\.sinks
    attention  model\.layers\.\d\.self_attn\.o_proj\.bias
    ffn        model\.layers\.\d\.mlp\.router\.(weight|bias)
    ffn        model\.layers\.\d\.mlp\.experts\.(gate_up|down)_proj(_bias)?
"""
LLAMA_BIAS = r"""
    attention  model\.layers\.\d\.self_attn\.o_proj\.bias
    ffn        model\.layers\.\d\.mlp\.(gate|up|down)_proj\.bias
"""
SHARED_EXPERT = r"""
    ffn        model\.layers\.\d\.mlp\.shared_expert\.(gate|up|down)_proj\.weight
    ffn        model\.layers\.\d\.mlp\.shared_expert_gate\.weight
"""

# Architecture: (configuration class, arguments beyond the usual, expected components).
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Qwen2": ("Qwen2Config", SIZES, DECODER + DENSE + QKV_BIAS + UNTIED),
    "Qwen2 tied": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}, DECODER + DENSE + QKV_BIAS),
    "Qwen3": ("Qwen3Config", SIZES, DECODER + DENSE + QK_NORM + UNTIED),
    "Qwen3 tied": ("Qwen3Config", SIZES | {"tie_word_embeddings": True}, DECODER + DENSE + QK_NORM),
    "Llama": ("LlamaConfig", SIZES, DECODER + DENSE + UNTIED),
    "Llama with biases": (
        "LlamaConfig",
        SIZES | {"attention_bias": True, "mlp_bias": True},
        DECODER + DENSE + QKV_BIAS + LLAMA_BIAS + UNTIED,
    ),
    "Mistral": ("MistralConfig", SIZES, DECODER + DENSE + UNTIED),
    "Gemma": ("GemmaConfig", SIZES, DECODER + DENSE),
    "Gemma 2": ("Gemma2Config", SIZES, DECODER + DENSE + SANDWICH_NORM),
    "Gemma 3": ("Gemma3TextConfig", SIZES, DECODER + DENSE + SANDWICH_NORM + QK_NORM),
    "GPT-2": ("GPT2Config", SIZES, GPT2),
    "GPT-NeoX": ("GPTNeoXConfig", SIZES, GPT_NEOX),
    "Mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4}, DECODER + EXPERTS + UNTIED),
    "Qwen2-MoE": (
        "Qwen2MoeConfig",
        SIZES | ROUTED | {"shared_expert_intermediate_size": 16},
        DECODER + QKV_BIAS + EXPERTS + SHARED_EXPERT + UNTIED,
    ),
    "Qwen3-MoE": ("Qwen3MoeConfig", SIZES | ROUTED, DECODER + QK_NORM + EXPERTS + UNTIED),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {key: value for key, value in SIZES.items() if key != "head_dim"}
        | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1}
        | {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
        DEEPSEEK,
    ),
    "GPT-OSS": ("GptOssConfig", SIZES | {"num_local_experts": 4}, DECODER + QKV_BIAS + GPT_OSS + UNTIED),
}


def meta_model(family: str) -> Any:
    """The architecture on the meta device: names, shapes and module types, but no memory."""
    kind, arguments, _ = FAMILIES[family]
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments))
