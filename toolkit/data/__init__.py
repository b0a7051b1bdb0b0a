"""Text to batches: sources of documents, tokenizers, and packing into full sequences."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from toolkit.data.documents import BadDocument, Documents
from toolkit.data.stream import open_documents

if TYPE_CHECKING:
    from toolkit.data.batches import Batches, rank_batches
    from toolkit.data.chat import read_template
    from toolkit.data.conversations import PackedConversations
    from toolkit.data.pack import PackedTokens
    from toolkit.data.passes import Position
    from toolkit.data.token_cache import TokenCache, open_cache
    from toolkit.data.tokenizers import TOKENIZERS, load_tokenizer

__all__ = [
    "TOKENIZERS",
    "BadDocument",
    "Batches",
    "Documents",
    "PackedConversations",
    "PackedTokens",
    "Position",
    "TokenCache",
    "load_tokenizer",
    "open_cache",
    "open_documents",
    "rank_batches",
    "read_template",
]
_LATER = {
    **dict.fromkeys(("Batches", "rank_batches"), "batches"),
    **{"PackedTokens": "pack", "Position": "passes"},
    **dict.fromkeys(("TokenCache", "open_cache"), "token_cache"),
    **dict.fromkeys(("TOKENIZERS", "load_tokenizer"), "tokenizers"),
    **{"read_template": "chat", "PackedConversations": "conversations"},
}


def __getattr__(name: str) -> Any:
    # Whether there are such data is said before torch is imported.
    if name in _LATER:
        return getattr(importlib.import_module(f"toolkit.data.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
