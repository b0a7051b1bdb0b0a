"""Text to batches: sources of documents, tokenizers, and packing into full sequences."""

from __future__ import annotations

from toolkit.data.documents import BadDocument, Documents
from toolkit.data.pack import Batches, PackedTokens, Position, rank_batches
from toolkit.data.stream import open_documents
from toolkit.data.tokenizers import TOKENIZERS, load_tokenizer

__all__ = [
    "TOKENIZERS",
    "BadDocument",
    "Batches",
    "Documents",
    "PackedTokens",
    "Position",
    "load_tokenizer",
    "open_documents",
    "rank_batches",
]
