"""Documents that cannot be used: notes while a run reads, the checkpoint where one ends the run, the final counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from toolkit.agreed import AgreedError

if TYPE_CHECKING:
    from toolkit.data import Batches, Position


class Notes:
    """Says once, by name, which documents `batches` skips first, and that characters are replaced or ends cut."""

    def __init__(self, batches: Batches, say: Callable[[str], None]) -> None:
        self._batches = batches
        self._say = say
        self._told = len(batches.position.named)
        self._replaced = batches.position.replaced > 0
        self._cut = batches.position.cut > 0

    def say_new(self) -> None:
        from toolkit.data.passes import NAMED

        found = self._batches.read_to
        for problem in found.named[self._told :]:
            self._say(f"note: skipped: {problem}")
        if self._told < len(found.named) == NAMED:
            self._say("note: further skipped documents are counted in summary.json only.")
        self._told = len(found.named)
        if found.replaced and not self._replaced:
            self._replaced = True
            self._say("note: the data hold bytes that are not text in their encoding; summary.json counts them.")
        if found.cut and not self._cut:
            self._cut = True
            self._say("note: conversations longer than --seq-len are cut at their end; summary.json counts them.")


@contextmanager
def saved_before(save: Callable[[], None]) -> Iterator[None]:
    """Calls `save` if a document ends the data within: every rank gets there in the same step."""
    from toolkit.data import BadDocument

    try:
        yield
    except BadDocument as error:
        save()
        raise AgreedError(str(error)) from None


def document_counts(read_to: Position) -> dict[str, Any]:
    """What summary.json says of the documents that were skipped in the first pass over the data."""
    return {
        "skipped_documents": read_to.skipped,
        "skipped_documents_first": list(read_to.named),
        "replaced_characters": read_to.replaced,
        "cut_conversations": read_to.cut,
    }
