"""Conversations to full sequences: whole ones side by side, of which only the answers are predicted."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.data.chat import Chat, Unusable
from toolkit.data.documents import BadDocument, Document
from toolkit.data.files import first_line
from toolkit.data.pack import HELD_OUT_TAIL, PackedTokens
from toolkit.data.passes import Placed, Position
from toolkit.errors import UserError
from toolkit.models.loss import IGNORED

if TYPE_CHECKING:
    from toolkit.data.documents import Documents

TOGETHER = 64
"""Sequences' worth of conversations that are fitted into sequences together."""
TRIED = 100
"""Data whose first so many conversations all cannot be used are refused."""
_PLANES = 3


class PackedConversations(PackedTokens):
    """The endless stream of sequences that a corpus of conversations gives.

    Shuffling, windows and epochs are those of `PackedTokens`. A sequence is int64 [3, seq_len + 1]: the tokens, the
    label of each (itself where it is part of an answer, else IGNORED) and its place in its conversation, which is what
    keeps conversations apart: attention does not cross from one to the next. As many conversations as `TOGETHER`
    sequences can hold are fitted into sequences at a time, each whole; what is left of a sequence is end-of-text
    tokens, which are not predicted. A conversation that is longer than a sequence is cut at its end, and counted. One
    without an answer, or whose answers all lie behind the cut, is skipped and counted.

    Raises:
        UserError: as `PackedTokens`, and as `Chat`.
    """

    packing = 2
    """To be raised with every change of the sequences. Of those before 2 checkpoints note nothing."""

    def __init__(self, documents: Documents, tokenizer: Any, seq_len: int, **options: Any) -> None:
        super().__init__(documents, tokenizer, seq_len, **options)
        self.chat = Chat(tokenizer, f"data {documents.name!r}")
        self._problem: str | None = None

    def _hand_out(self, sequence: np.ndarray) -> None:
        for ids, labels, _ in np.split(sequence, np.flatnonzero(sequence[2] == 0)[1:], axis=1):
            self._pass.answers += self._bytes(ids[labels != IGNORED])

    def text_bytes(self) -> int:
        """As `PackedTokens`, of the answers."""
        return self._pass.answers

    def require(self, sequences: int) -> None:
        for number, (_, document, _) in enumerate(self._tokenized(Position()), start=1):
            if not document.problem:
                break
            if number == TRIED:
                raise UserError(self._nothing())
        for full, (following, _) in enumerate(self._in_order(Position()), start=1):
            if full == sequences:
                return
            if following.epoch > 0:
                raise UserError(
                    f"data {self._name} are smaller than one batch: the conversations fill {full} sequences of "
                    f"{self.seq_len} tokens, the global batch needs {sequences}; lower --global-batch or --seq-len."
                )

    def _in_order(
        self, start: Position, documents: Iterator[Placed] | None = None
    ) -> Iterator[tuple[Position, np.ndarray]]:
        """As `PackedTokens`; the offset of a position counts sequences from the first of those fitted together on."""
        begun, given, passed = start, start.offset, start
        held: list[np.ndarray] = []
        length = 0
        end = Placed(Position(start.epoch + 1), Document("", ""), np.empty((_PLANES, 0), np.int64))
        for place, document, tokens in chain(documents or self._tokenized(start), [end]):
            # What is skipped belongs to the group before it: a group begins with a conversation of its epoch.
            full = length >= TOGETHER * (self.seq_len + 1) and tokens.shape[1]
            if held and (full or place.epoch != begun.epoch):
                sequences = self._fitted(held)
                for number, sequence in enumerate(sequences[given:], start=given + 1):
                    last = number == len(sequences)
                    yield passed.at(place if last else replace(begun, offset=number)), sequence
                begun, given, held, length = place, 0, [], 0
            if place.epoch == 0 and document.counted and not given:
                passed = passed.after(document)
            if tokens.shape[1]:
                held.append(tokens)
                length += tokens.shape[1]

    def _fitted(self, conversations: list[np.ndarray]) -> list[np.ndarray]:
        """Sequences of these: from the longest on, each goes where it leaves least room. As their first ones came."""
        size = self.seq_len + 1
        members: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (room, number of the sequence), sorted
        for index in sorted(range(len(conversations)), key=lambda index: -conversations[index].shape[1]):
            length = conversations[index].shape[1]
            place = bisect_left(rooms, (length, 0))
            room, number = rooms.pop(place) if place < len(rooms) else (size, len(members))
            if number == len(members):
                members.append([])
            members[number].append(index)
            insort(rooms, (room - length, number))
        return [self._filled([conversations[index] for index in sorted(some)]) for some in sorted(members, key=min)]

    def _filled(self, conversations: list[np.ndarray]) -> np.ndarray:
        room = self.seq_len + 1 - sum(one.shape[1] for one in conversations)
        filling = np.stack([np.full(room, self.tokenizer.eos_token_id), np.full(room, IGNORED), np.arange(room)])
        return np.concatenate([*conversations, filling], axis=1)

    def _encode(self, documents: list[Document]) -> list[tuple[Document, np.ndarray]]:
        return [self._rendered(document) for document in documents]

    def _rendered(self, document: Document) -> tuple[Document, np.ndarray]:
        """A conversation's tokens, labels and places, int64 [3, tokens]; those of one that is skipped are empty."""
        nothing = np.empty((_PLANES, 0), np.int64)
        if document.problem:
            self._problem = self._problem or document.problem
            return document, nothing
        size = self.seq_len + 1
        try:
            ids, answered = self.chat.encode(document.text)
            labels = np.where(answered, ids, IGNORED)
            labels[:1] = IGNORED  # nothing is before it that it could be predicted from
            if not (labels[:size] != IGNORED).any():
                where = (
                    f"its answers begin behind the first {size} tokens" if answered.any() else "its answers are empty"
                )
                raise Unusable(where)
        except BaseException as error:
            # Tokenizers raise anything about a text, and a panic of Rust is no Exception.
            panic = type(error).__name__ == "PanicException"
            if not panic and (not isinstance(error, Exception) or isinstance(error, MemoryError | OSError)):
                raise
            why = str(error) if isinstance(error, Unusable) else f"it cannot be tokenized ({first_line(error)})"
            problem = f"{document.where} cannot be used: {why}."
            if self.documents.bad == "stop":
                raise BadDocument(problem) from error
            self._problem = self._problem or problem
            return Document("", document.where, problem), nothing
        planes = np.stack([ids, labels, np.arange(len(ids))])[:, :size]
        return document._replace(cut=len(ids) > size), planes

    def _part_of_few(self, documents: list[Document]) -> Iterator[Document]:
        """This part of few conversations: all but the last tenth of them, one at least, or that."""
        usable = [number for number, document in enumerate(documents) if not document.problem]
        held_out = usable[len(usable) - max(1, len(usable) // HELD_OUT_TAIL) :] if len(usable) > 1 else []
        for number, document in enumerate(documents):
            if (number in held_out) == (self.part == "validation"):
                yield document

    def _nothing(self) -> str:
        if self.part == "validation":
            return super()._nothing()
        return self._problem or f"data {self._name} hold no conversation with an answer."
