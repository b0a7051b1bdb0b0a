"""Folders of very small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
"""Of every small model; architectures and sizes of vocabularies differ."""


def qwen3(folder: Path, **overrides: object) -> str:
    transformers.Qwen3Config(**(SHAPE | {"vocab_size": 96} | overrides)).save_pretrained(folder)
    return str(folder)
