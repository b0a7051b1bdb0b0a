"""The texts that a run trains and validates on, as its checkpoints note them, so that they can be found again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from toolkit.run.settings import RunSettings

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from toolkit.data import PackedTokens
    from toolkit.data.documents import BadDocuments


def texts(settings: RunSettings) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a run trains on, and what it validates on, if it does; JSON, for `open_text`."""
    held_out = settings.eval_every > 0 and settings.val_data is None
    training = {
        "name": settings.data,
        "part": "train" if held_out else "all",
        "subset": settings.data_subset,
        "text_column": settings.text_column,
    }
    if settings.eval_every == 0:
        return training, None
    if held_out:
        return training, training | {"part": "validation", "sequences": settings.eval_sequences}
    subset = settings.data_subset if settings.val_data == settings.data else None
    own = {"name": settings.val_data, "subset": subset, "sequences": settings.eval_sequences}
    return training, training | own


def open_text(
    text: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    seed: int,
    *,
    bad: BadDocuments = "skip",
    shuffle_window: int = 1024,
) -> PackedTokens:
    """A text of `texts`, or conversations, packed. Raises UserError where it cannot be read."""
    from toolkit import data

    documents = data.open_documents(text["name"], subset=text["subset"], text_column=text["text_column"], bad=bad)
    kind = data.PackedConversations if documents.conversations else data.PackedTokens
    return kind(documents, tokenizer, seq_len, seed=seed, part=text["part"], shuffle_window=shuffle_window)


def digest(sequences: Iterable[np.ndarray]) -> str:
    """SHA-256 of tokens: whether a text is still what the run validated on."""
    found = hashlib.sha256()
    for sequence in sequences:
        found.update(sequence.astype("<i8").tobytes())
    return found.hexdigest()
