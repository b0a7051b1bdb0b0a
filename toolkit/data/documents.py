"""What a corpus is made of: documents, and among them those that cannot be used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from toolkit.errors import UserError

LONGEST = 1 << 26
"""Characters of the longest document, and of the longest line of a JSON file: a bound on memory, whatever a small
compressed file grows to."""
UNDECODED = "\udcff"
"""Stands, while a file is read, for bytes that are no text in its encoding. No decoded text holds one."""
FINGERPRINTED = 256
"""Documents that tell one corpus from another."""

BadDocuments = Literal["skip", "stop"]

# One NUL in so many characters: another encoding (every second one is), or a file whose blocks were never written.
_NULS = 10
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadDocument(UserError):
    """A document that stops whoever reads; every rank meets it at the same place."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem} --bad-documents skip leaves such documents out.")


class Document(NamedTuple):
    """One document: its text, or, with no text, the problem that it is skipped for.

    `where` it stands and `problem` are for messages; the latter is a sentence that names the place. `replaced`
    characters of the text stand for bytes that are none in the file's encoding. `cut`: its end is left out.
    """

    text: str
    where: str
    problem: str = ""
    replaced: int = 0
    cut: bool = False

    @property
    def counted(self) -> bool:
        """Whether there is anything to tell of it."""
        return bool(self.problem or self.replaced or self.cut)


def document(text: str, where: str) -> Document:
    """The document that `text`, found at `where`, is."""
    if len(text) > LONGEST:
        return Document(
            "", where, f"{where} holds more than {LONGEST:,} characters, the most that a document may have."
        )
    if "\0" in text and text.count("\0") * _NULS >= len(text):
        return Document(
            "", where, f"{where} holds so many NUL characters that it is no text, or UTF-16 or UTF-32 without its mark."
        )
    replaced = 0
    if not text.isascii():
        replaced = text.count(UNDECODED)
        text = text.replace(UNDECODED, "\N{REPLACEMENT CHARACTER}") if replaced else text
        if found := _SURROGATE.search(text):
            half = f"\\u{ord(found[0]):x}"
            return Document("", where, f"{where} holds half of a surrogate pair ({half}), which is no character.")
    return Document(text, where, replaced=replaced)


@dataclass(frozen=True)
class Documents:
    """A corpus that can be read any number of times, always in the same order.

    `name` is what the user called it, for messages; `read` starts one pass, over plain texts or documents; `sizes` are
    those of its files, in order, where it has any. `bad` says what becomes of documents that cannot be used: they are
    skipped, or the first one stops whoever reads. `state` changes where anything that `read` gives may have changed;
    empty, nothing is known of that. Each text of `conversations` is one, in JSON. Iterating gives the texts that can be
    used.
    """

    name: str
    read: Callable[[], Iterator[Document] | Iterator[str]]
    sizes: tuple[int, ...] = ()
    bad: BadDocuments = "skip"
    state: tuple[object, ...] = ()
    conversations: bool = False

    def __iter__(self) -> Iterator[str]:
        return (found.text for found in self.documents() if not found.problem)

    def documents(self) -> Iterator[Document]:
        """One pass over all documents, without those that are empty.

        Raises:
            BadDocument: a document cannot be used, and `bad` is "stop".
        """
        for number, item in enumerate(self.read(), start=1):
            where = f"document {number} of {self.name!r}"
            found: Document = item if isinstance(item, Document) else document(str(item), where)
            if found.problem:
                if self.bad == "stop":
                    raise BadDocument(found.problem)
                yield found
            elif found.text and not found.text.isspace():
                yield found

    def fingerprint(self) -> str:
        """SHA-256 of the first texts and of the files' sizes: the same corpus wherever it lies."""
        digest = hashlib.sha256(repr(self.sizes).encode())
        for text in islice(self, FINGERPRINTED):
            digest.update(f"{len(text)}:{text}".encode())
        return digest.hexdigest()
