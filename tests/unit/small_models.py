"""Folders of very small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers


def qwen3(folder: Path, **overrides: object) -> str:
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    transformers.Qwen3Config(**(settings | overrides)).save_pretrained(folder)
    return str(folder)
