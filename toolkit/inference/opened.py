"""A trained model with its tokenizer, from a checkpoint or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from toolkit import data, models
from toolkit.checkpoint.export import load_model, moved
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.checkpoint.wrong import is_exported
from toolkit.errors import UserError
from toolkit.models.build import complete
from toolkit.records.activations import Activations
from toolkit.sentences import value_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Opened:
    """A model on its device, one copy of it in memory.

    `step` and `facts` (as `Manifest` has them) are the checkpoint's, and `ranks` the number that saved it.
    """

    folder: Path
    model: models.CausalLM
    tokenizer: PreTrainedTokenizerBase
    step: int | None = None
    ranks: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def positions(self) -> int | None:
        """Tokens that the model can look back on; None where its configuration sets no bound."""
        found: int | None = getattr(self.model.hf.config, "max_position_embeddings", None)
        return found

    def note(self, path: str) -> Any:
        """What the checkpoint notes at a dotted path; None where it notes nothing."""
        return value_at(self.facts, path)


def open_model(folder: Path, base: Path | None = None) -> Opened:
    """The model in `folder`, a checkpoint or one in Hugging Face's layout, on the GPU where there is one.

    `base`: where the weights beside a checkpoint's adapters are, if they were moved.

    Its loss is computed as in the run's validation.

    Raises:
        UserError: the files are damaged, or do not say which model it is.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    opened = _of_a_folder(folder) if is_exported(folder) else _of_a_checkpoint(folder, base)
    opened.model.eval().requires_grad_(False)
    if accelerator is not None:
        opened.model.to(accelerator)
    else:
        models.cpu_matmul.install()  # as in training
    return opened


def _of_a_folder(folder: Path) -> Opened:
    config, _ = models.load_config(str(folder))
    dtype = getattr(config, "dtype", None) or torch.float32
    tokenizer = data.load_tokenizer(str(folder))
    return Opened(folder, models.build_model(str(folder), dtype=dtype, seed=0, from_checkpoint=True), tokenizer)


def _of_a_checkpoint(folder: Path, base: Path | None) -> Opened:
    source = open_checkpoint(folder)
    moved(source, base)
    hf, facts = load_model(source), source.manifest.facts
    kept = any("tokenizer" in name for name in source.model_files())
    tokenizer = data.load_tokenizer(str(folder) if kept else value_at(facts, "identity.tokenizer.name"))
    preset = models.PRESETS.get(value_at(facts, "identity.model.name") or "")
    model = complete(hf, preset, Activations(), value_at(facts, "run.settings.loss"))
    if not folder.is_dir():  # of a tokenizer's files some may be missing without an error
        raise UserError(f"{folder} was removed while it was read")
    return Opened(folder, model, tokenizer, source.manifest.step, source.origin.world_size, facts)
