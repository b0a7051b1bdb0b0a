"""The frozen model beside which adapters were trained: checkpoints name it, and do not hold it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint.content import BASE
from toolkit.checkpoint.model_files import CONFIG
from toolkit.console import waiting
from toolkit.errors import UserError
from toolkit.models.lora import refuse_adapters
from toolkit.models.presets import first_line, load_config
from toolkit.paths import inside
from toolkit.sentences import shown, value_at

PREFIX = "hf."
"""The transformers model is this part of the module that was trained."""
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_NAMED = "transformers_weights"
"""Key of a config.json that names other weights than these."""
_DISTRIBUTED = "shard-*-model-*-of-*.safetensors"
"""Files that transformers prefers to all others, and reads together with whatever lies beside them."""
_known: dict[tuple[Path, int, int], bytes] = {}
"""Digests of files by path, size and time: in one process each is read once."""


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
    def of(cls, folder: Path, say: Callable[[str], None] | None = None) -> Base:
        """Reads all weights, as `weights_hash` does. Raises UserError."""
        return cls(str(folder.expanduser().resolve()), weights_hash(folder.expanduser(), say))

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

        They are loaded once, as the model that the checkpoint `where` is of: its own config.json counts, whatever that
        of the folder says by now. Raises UserError, of `where`: it is not there, or not what it was.
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
            config = load_config(str(where))[0] if (where / CONFIG).is_file() else None
            if config is not None and (named := _named(folder)) is not None:
                setattr(config, _NAMED, named)  # which no copy of a configuration keeps
            self._loaded.update(load_pretrained(folder, usual, None, config).state_dict())
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


def weights_hash(folder: Path, say: Callable[[str], None] | None = None) -> str:
    """SHA-256, in hex, of the weight files in `folder`, in the order of their names.

    `say` is told what is read where that takes a while; None: only a terminal is.

    Raises:
        UserError: a file cannot be read, or transformers would load more than these.
    """
    found = hashlib.sha256()
    try:
        with waiting(f"reading the weights in {folder}, to note which they are", say):
            for name in _files(folder):
                found.update(_digest(folder / name))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror or error}.") from None
    return found.hexdigest()


def _digest(path: Path) -> bytes:
    about = path.stat()
    key = path.resolve(), about.st_size, about.st_mtime_ns
    if key not in _known:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").digest()
    return _known[key]


def _files(folder: Path) -> list[str]:
    """As transformers looks for them. What it would load beside them is refused."""
    refuse_adapters(folder)
    if (other := min(folder.glob(_DISTRIBUTED), default=None)) is not None:
        raise UserError(
            f"{folder} holds a distributed checkpoint ({other.name}), beside which no adapters are trained; load it "
            "with transformers, save_pretrained it elsewhere, and name that folder."
        )
    named = _named(folder)
    if named is not None:
        inside(folder, named)
        return _listed(folder / named) if named.endswith(".index.json") else [named]
    for single, index in zip(_SINGLE, _INDICES, strict=True):
        if (folder / single).exists():
            return [single]
        if (folder / index).exists():
            return _listed(folder / index)
    raise UserError(f"{folder} holds no weights: none of {', '.join((*_SINGLE, *_INDICES))}.")


def _named(folder: Path) -> str | None:
    """The weights that the folder's config.json names, if it does."""
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(_NAMED)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}).") from None
    if found is not None and not isinstance(found, str):
        raise UserError(f"{path}: {_NAMED} is {shown(found)}, and must be the name of a file.")
    return found


def _listed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({first_line(error)}).") from None
