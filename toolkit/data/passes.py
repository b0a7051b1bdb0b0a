"""Places in a corpus, and what a pass over it has met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from toolkit.data.documents import Document

NAMED = 5
"""Documents that are skipped and named; further ones are counted."""


@dataclass(frozen=True)
class Position:
    """Sequence number `mixed` of the group that starts at token `offset` of document `index` of `window`.

    Document and sequence are counted after shuffling. Together with the documents, the tokenizer and the seed
    it fixes everything that follows.

    The rest tells what came before that group in the first pass over the documents: how many were skipped because
    they cannot be used, what is wrong with the first of them (`named`), how many characters stand for bytes that
    are none, and how many conversations were cut.
    """

    epoch: int = 0
    window: int = 0
    index: int = 0
    offset: int = 0
    mixed: int = 0
    skipped: int = 0
    named: tuple[str, ...] = ()
    replaced: int = 0
    cut: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "named", tuple(self.named))  # JSON makes a list of it

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.epoch, self.window, self.index, self.offset

    def after(self, document: Document) -> Position:
        """This position, with `document` counted."""
        named = (*self.named, document.problem) if document.problem and self.skipped < NAMED else self.named
        skipped = self.skipped + bool(document.problem)
        return replace(
            self, skipped=skipped, named=named, replaced=self.replaced + document.replaced, cut=self.cut + document.cut
        )

    def at(self, place: Position) -> Position:
        """These counts, where `place` is."""
        epoch, window, index, offset = place.place
        return replace(self, epoch=epoch, window=window, index=index, offset=offset, mixed=0)


class Placed(NamedTuple):
    """A document with its place and its tokens, end of text included; one that is skipped has none."""

    place: Position
    document: Document
    tokens: np.ndarray


@dataclass
class Pass:
    """What sequences from the beginning of a corpus on stand for: their documents, up to the one that they end in.

    `tokens` and `bytes` are of the documents before the `latest`, `first` the first token; `predicted` tokens were
    handed out. `answers`: bytes of what is predicted of conversations.
    """

    predicted: int = 0
    answers: int = 0
    tokens: int = 0
    bytes: int = 0
    first: np.ndarray | None = None
    latest: tuple[Document, np.ndarray] | None = None

    def noted(self, documents: Iterator[Placed]) -> Iterator[Placed]:
        """`documents`, each of which is the latest one until the next is asked for."""
        for found in documents:
            if self.latest is not None:
                self.tokens += len(self.latest[1])
                self.bytes += len(self.latest[0].text.encode())
            self.latest = found.document, found.tokens
            if self.first is None and len(found.tokens):
                self.first = found.tokens[:1]
            yield found
