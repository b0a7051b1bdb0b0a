"""A trained model with its tokenizer, from a checkpoint or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from toolkit import data, models
from toolkit.checkpoint.export import load_model
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.checkpoint.wrong import is_exported
from toolkit.models.build import complete
from toolkit.records.activations import Activations

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

    def note(self, *keys: str) -> Any:
        """What the checkpoint notes under these keys, one within the other; None where it notes nothing."""
        found: Any = self.facts
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


def open_model(folder: Path) -> Opened:
    """The model in `folder`, a checkpoint or one in Hugging Face's layout, on the GPU where there is one.

    Its loss is computed as in the run's validation.

    Raises:
        UserError: the files are damaged, or do not say which model it is.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    opened = _of_a_folder(folder) if is_exported(folder) else _of_a_checkpoint(folder)
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


def _of_a_checkpoint(folder: Path) -> Opened:
    source = open_checkpoint(folder)
    hf = load_model(source)
    opened = Opened(folder, models.CausalLM(hf), None, source.manifest.step)  # type: ignore[arg-type]
    opened.facts, opened.ranks = source.manifest.facts, source.origin.world_size
    kept = any("tokenizer" in name for name in source.model_files())
    opened.tokenizer = data.load_tokenizer(str(folder) if kept else opened.note("identity", "tokenizer", "name"))
    preset = models.PRESETS.get(opened.note("identity", "model", "name") or "")
    opened.model = complete(hf, preset, Activations(), opened.note("run", "settings", "loss"))
    return opened
