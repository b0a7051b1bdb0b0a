"""What describes a model beside its weights: config.json, the tokenizer's files and generation settings.

A run keeps them in its checkpoints, as they were when it began: a folder that `--model` names may be another one by
the time of an export.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG = "config.json"
GENERATION = "generation_config.json"
# Entries of a configuration that say how it was made, not what it is.
_INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def model_files(config: PretrainedConfig, tokenizer: Any, folder: Path) -> dict[str, bytes]:
    """The files by name; generation settings are those of `folder`, where it has any."""
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        # Chat templates into tokenizer_config.json: a checkpoint has no folders.
        tokenizer.save_pretrained(place, save_jinja_files=False)
        found = {path.name: path.read_bytes() for path in sorted(Path(place).iterdir()) if path.is_file()}
    settings = (folder.parent if folder.name == CONFIG else folder) / GENERATION
    return found | ({GENERATION: settings.read_bytes()} if settings.is_file() else {})


def config_hash(config: PretrainedConfig) -> str:
    """SHA-256, in hex, of what makes the model what it is."""
    shape = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}
    return _digest(json.dumps(shape, sort_keys=True, default=str))


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256, in hex, of the tokenizer's vocabulary and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _digest(backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
