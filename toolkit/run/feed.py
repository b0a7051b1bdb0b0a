"""Documents that cannot be used: what is said of them while a run reads, and what is left when one ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from toolkit.run import ranks

if TYPE_CHECKING:
    from toolkit.data import Batches, Position


class Telling:
    """Says once, by name, what the first documents are that `batches` passes over, and that characters are replaced."""

    def __init__(self, batches: Batches, say: Callable[[str], None]) -> None:
        self._batches = batches
        self._say = say
        self._told = len(batches.position.named)
        self._replaced = batches.position.replaced > 0

    def tell(self) -> None:
        from toolkit.data.pack import NAMED

        found = self._batches.read_to
        for problem in found.named[self._told :]:
            self._say(f"note: passed over: {problem}")
        if self._told < len(found.named) == NAMED:
            self._say("note: further documents that are passed over are counted in summary.json only.")
        self._told = len(found.named)
        if found.replaced and not self._replaced:
            self._replaced = True
            self._say("note: the data hold bytes that are no text in their encoding; summary.json counts them.")


@contextmanager
def kept(save: Callable[[], None] | None) -> Iterator[None]:
    """Where a document stops the data, which it does in the same step on every rank, saves the steps before it."""
    from toolkit.data import BadDocument

    try:
        yield
    except BadDocument as error:
        if save is not None:
            save()
        raise ranks.AgreedError(str(error)) from None


def counted(read_to: Position) -> dict[str, Any]:
    """What summary.json says of the documents that were passed over in the first pass over the data."""
    return {
        "skipped_documents": read_to.skipped,
        "skipped_documents_first": list(read_to.named),
        "replaced_characters": read_to.replaced,
    }
