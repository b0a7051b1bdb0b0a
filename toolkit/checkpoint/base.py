"""The frozen model beside which adapters were trained: checkpoints name it, and do not hold it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint.content import BASE
from toolkit.errors import UserError
from toolkit.models.presets import first_line
from toolkit.sentences import value_at

PREFIX = "hf."
"""The transformers model is this part of the module that was trained."""
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def in_base(name: str) -> bool:
    """Whether a frozen parameter of a model with adapters is one of the base's."""
    return name.startswith(PREFIX) and ".lora_" not in name


@dataclass(frozen=True)
class Base:
    """A folder with a Hugging Face model, and the SHA-256, in hex, of its weight files."""

    path: str
    sha256: str
    _loaded: dict[str, Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def of(cls, folder: Path) -> Base:
        """Reads all weights. Raises UserError."""
        return cls(str(folder.expanduser().resolve()), weights_hash(folder.expanduser()))

    @classmethod
    def noted(cls, facts: Mapping[str, Any]) -> Base | None:
        """What the manifest of a checkpoint says of its base; None where it has none, or holds all weights itself."""
        path, sha256 = (value_at(facts, f"identity.model.base.{key}") for key in ("path", "sha256"))
        return cls(path, sha256) if isinstance(path, str) and isinstance(sha256, str) else None

    @property
    def facts(self) -> dict[str, str]:
        """What the manifest says of it."""
        return {"path": self.path, "sha256": self.sha256}

    def weights(self, dtypes: Iterable[torch.dtype], where: Path) -> dict[str, Tensor]:
        """Its weights by the names of transformers' model, on the CPU, in the most common of `dtypes`.

        They are loaded once. Raises UserError, of the checkpoint `where`: it is not there, or not what it was.
        """
        from toolkit.models.build import load_pretrained

        if not self._loaded:
            folder, needed = Path(self.path), f"{where} holds adapters only"
            again = "--model names the folder that holds it now"
            if not folder.is_dir():
                raise UserError(f"{needed}, and the model beside them, {folder}, is not there; {again}")
            if weights_hash(folder) != self.sha256:
                raise UserError(f"{needed}, and {folder} has other weights than the model beside them; {again}")
            usual = Counter(dtypes).most_common(1)[0][0]
            self._loaded.update(load_pretrained(folder, usual, None).state_dict())
        return self._loaded


def shapes_in_base(saved: Mapping[str, Any], folder: Path) -> dict[str, torch.Size]:
    """Of the module's file `saved` of a checkpoint in `folder`: shapes of what is in its base alone, by name."""
    found: Mapping[str, Any] = saved.get(BASE) or {}
    if any(not isinstance(saved["module"].get(name), Tensor) for name in found):
        raise UserError(f"{folder} is damaged (it names weights of its base that its module lacks)")
    return {name: torch.Size(shape) for name, shape in found.items()}


def weight_in_base(base: Base | None, name: str, kept: Tensor, dtypes: Iterable[torch.dtype], folder: Path) -> Tensor:
    """One of the parameters that the checkpoint in `folder` leaves to `base`, in the shape and dtype of `kept`.

    `dtypes`: of all of them.
    """
    if base is None:
        raise UserError(f"{folder} is damaged (it does not say which model its adapters were trained beside)")
    found = base.weights(dtypes, folder).get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
    if found is None or found.shape != kept.shape:
        raise UserError(f"{folder} is damaged ({name!r} is none of the weights in {base.path})")
    return found.to(kept.dtype)


def weights_hash(folder: Path) -> str:
    """SHA-256, in hex, of the weight files in `folder`, in the order of their names. Raises UserError."""
    found = hashlib.sha256()
    try:
        for name in _files(folder):
            with (folder / name).open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror or error}.") from None
    return found.hexdigest()


def _files(folder: Path) -> list[str]:
    """As transformers looks for them."""
    for single, index in zip(_SINGLE, _INDICES, strict=True):
        if (folder / single).exists():
            return [single]
        if (folder / index).exists():
            try:
                return sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{folder / index} is damaged ({first_line(error)}).") from None
    raise UserError(f"{folder} holds no weights: none of {', '.join((*_SINGLE, *_INDICES))}.")
