"""Text to batches: sources of documents, tokenizers, and packing into full sequences."""

from __future__ import annotations

from toolkit.data.batches import Batches, rank_batches
from toolkit.data.chat import read_template
from toolkit.data.conversations import PackedConversations
from toolkit.data.documents import BadDocument, Documents
from toolkit.data.pack import PackedTokens, Position
from toolkit.data.stream import open_documents
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
