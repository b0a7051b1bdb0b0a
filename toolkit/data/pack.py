"""Documents to full sequences of tokens, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, count, islice, takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from toolkit.data.documents import BadDocument, Document, Documents
from toolkit.data.files import first_line
from toolkit.data.passes import Pass, Placed, Position
from toolkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Every 100th document is held out. A streamed corpus has no known length that the rule could depend on.
HELD_OUT_EVERY = 100
# Of a corpus that has fewer, the tail: a tenth of its characters.
HELD_OUT_TAIL = 10
ENCODE_TOGETHER = 64

Part = Literal["all", "train", "validation"]


class Group(NamedTuple):
    """Sequences that are mixed among each other, in the order of the documents, and where the next group starts.

    `tokens`: [sequences, ...], of each what `PackedTokens.sequences` hands out, uint16 where that holds it all, else
    int32.
    """

    tokens: np.ndarray
    following: Position


class PackedTokens:
    """The endless stream of packed sequences that a corpus gives.

    Documents are taken in windows of `shuffle_window`, each window in an order drawn from (seed, epoch,
    window number): neither the number of ranks nor the micro-batch has a part in it. Each document is
    tokenized without special tokens and closed by the end-of-text token; the tokens are cut into sequences
    of `seq_len` + 1, each of which starts with the last token of the one before. So every token but the very
    first is predicted exactly once, nothing is padded, and at the end of the corpus the next epoch continues in
    the middle of a sequence. Groups of `sequence_window` sequences are then handed out in shuffled order, so that
    a long document does not fill a batch alone.

    Args:
        documents: the corpus; iterated once per epoch, always in the same order. Those that cannot be used or
            tokenized are skipped and counted, or stop the stream, as `Documents.bad` says.
        tokenizer: any transformers tokenizer with an `eos_token_id`.
        seq_len: predictions per sequence.
        seed: fixes the order, at least 0.
        part: ``validation`` is every 100th document in source order, or, where there are fewer, the last tenth of their
            characters; ``train`` is the rest, ``all`` both.
        shuffle_window: documents that are shuffled among each other; 1 keeps the source order.
        sequence_window: sequences that are shuffled among each other; 1 keeps the order of the documents.

    Raises:
        UserError: a number out of range; while reading, a part without any text, or a document that stops the stream.
    """

    packing: int | None = None
    """Version of how sequences are made of what checkpoints note of the data; None where there has been one alone."""

    def __init__(
        self,
        documents: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        *,
        seed: int,
        part: Part = "all",
        shuffle_window: int = 1024,
        sequence_window: int = 256,
    ) -> None:
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("seed", seed, 0),
            ("shuffle_window", shuffle_window, 1),
            ("sequence_window", sequence_window, 1),
        ):
            if value < least:
                raise UserError(f"{name} is {value}, but must be at least {least}.")
        self.documents: Documents = (
            documents if isinstance(documents, Documents) else Documents("given", lambda: iter(documents))
        )
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.part = part
        self.shuffle_window = shuffle_window
        self.sequence_window = sequence_window
        self.position = Position()
        self._pass = Pass()
        self.read_to = Position()
        """The end of the group that `position` is in, up to which documents have been read and counted."""

    def sequences(self, start: Position | None = None, groups: Iterator[Group] | None = None) -> Iterator[np.ndarray]:
        """The sequences from `start` (the beginning if None) on, without end: int64 arrays [seq_len + 1].

        Before each is handed out, `position` moves to the one after it. `groups`: where its `groups` come from, if they
        are not made here.
        """
        start = start or Position()
        self.position = start
        group_start = replace(start, mixed=0)
        given_out = start.mixed
        for tokens, following in groups or self.groups(group_start):
            self.read_to = following
            order = np.random.default_rng((self.seed, *group_start.place, 0)).permutation(len(tokens))
            for number in range(given_out, len(tokens)):
                last = number + 1 == len(tokens)
                self.position = following if last else replace(group_start, mixed=number + 1)
                yield tokens[order[number]].astype(np.int64)
            group_start, given_out = following, 0

    def groups(self, start: Position) -> Iterator[Group]:
        """The groups from `start` on, which begins one, without end."""
        stream = self._in_order(start)
        while True:
            found = list(islice(stream, self.sequence_window))
            most, least = max(int(tokens.max()) for _, tokens in found), min(int(tokens.min()) for _, tokens in found)
            kind = np.uint16 if least >= 0 and most <= np.iinfo(np.uint16).max else np.int32
            yield Group(np.stack([tokens.astype(kind) for _, tokens in found]), found[-1][0])

    def first_pass(self, most: int) -> list[np.ndarray]:
        """Up to `most` sequences that begin before the documents repeat, in the order of the documents.

        `position` is then the end of the last one.
        """
        found: list[np.ndarray] = []
        for sequence in self._from_the_beginning(self._tokenized(Position())):
            found.append(sequence)
            if len(found) == most or self.position.epoch > 0:
                break
        return found

    def once(self) -> Iterator[np.ndarray]:
        """The sequences of one pass over the documents, in their order; the last ends with them, and may be shorter.

        `position` then tells how many documents have been skipped.
        """
        return self._from_the_beginning(takewhile(lambda found: found[0].epoch == 0, self._tokenized(Position())))

    def _from_the_beginning(self, documents: Iterator[Placed]) -> Iterator[np.ndarray]:
        """The sequences of `documents`, in their order; `text_bytes` is then of those that were handed out."""
        self._pass = Pass()
        for following, sequence in self._in_order(Position(), self._pass.noted(documents)):
            self.position = following
            if sequence.shape[-1] > 1:
                self._hand_out(sequence)
                yield sequence

    def _hand_out(self, sequence: np.ndarray) -> None:
        self._pass.predicted += len(sequence) - 1

    def text_bytes(self) -> int:
        """Bytes in UTF-8 of the text that the sequences predict which `once` or `first_pass` has last handed out.

        Ends of text are none, and neither is a character that is cut at the end.
        """
        found = self._pass
        assert found.first is not None and found.latest is not None, "nothing was handed out"
        (document, ids), left = found.latest, found.predicted + 1 - found.tokens
        latest = len(document.text.encode()) if len(ids) <= left + 1 else self._bytes(ids[:left])
        return found.bytes + latest - self._bytes(found.first)

    def _bytes(self, ids: np.ndarray) -> int:
        text: Any = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(str(text).rstrip("\N{REPLACEMENT CHARACTER}").encode())

    def _in_order(
        self, start: Position, documents: Iterator[Placed] | None = None
    ) -> Iterator[tuple[Position, np.ndarray]]:
        """The sequences before they are mixed, each with where the one after it starts.

        `documents`: from `start` on, if not all that there are, without end; the last sequence is then what is left,
        one token that another one ended with at least.
        """
        size = self.seq_len + 1
        block = np.empty(size, np.int64)
        filled = 0
        passed = start
        for place, document, tokens in documents or self._tokenized(start):
            first = place.place[:3] == start.place[:3]
            # A stream that resumes in the middle of a document has counted that one.
            counted = place.epoch > 0 or (first and start.place != Position().place)
            if not counted and document.counted:
                passed = passed.after(document)
            taken = start.offset if first else 0
            while taken < len(tokens):
                piece = tokens[taken : taken + size - filled]
                block[filled : filled + len(piece)] = piece
                filled += len(piece)
                taken += len(piece)
                if filled == size:
                    yield passed.at(replace(place, offset=taken - 1)), block.copy()
                    block[0] = block[-1]
                    filled = 1
        yield passed.at(Position(start.epoch + 1)), block[:filled].copy()

    def require(self, sequences: int) -> None:
        """Check that one pass over the documents fills `sequences` sequences; tokenizes only until it does.

        Raises:
            UserError: it does not.
        """
        needed = sequences * self.seq_len + 1
        tokens = skipped = 0
        for place, document, ids in self._tokenized(Position()):
            if place.epoch > 0:
                full = max(tokens - 1, 0) // self.seq_len
                without = f" without the {skipped} documents that cannot be used" if skipped else ""
                raise UserError(
                    f"corpus {self._name} is smaller than one batch: it has {full} full sequences of "
                    f"{self.seq_len} tokens{without}, the global batch needs {sequences}."
                )
            skipped += bool(document.problem)
            tokens += len(ids)
            if tokens >= needed:
                return

    @property
    def _name(self) -> str:
        return repr(self.documents.name)

    def _tokenized(self, start: Position) -> Iterator[Placed]:
        """Each document from that of `start` on, without end."""
        for epoch in count(start.epoch):
            source = self._documents()
            found = (epoch, 0, 0) < start.place[:3]  # what is left of an epoch may well be nothing
            for window in count():
                documents = list(islice(source, self.shuffle_window))
                if not documents:
                    break
                if (epoch, window) < (start.epoch, start.window):
                    continue
                first = start.index if (epoch, window) == (start.epoch, start.window) else 0
                order = np.random.default_rng((self.seed, epoch, window)).permutation(len(documents))
                for index in range(first, len(documents), ENCODE_TOGETHER):
                    some = [documents[i] for i in order[index : index + ENCODE_TOGETHER]]
                    for offset, (document, tokens) in enumerate(self._encode(some)):
                        found = found or not document.problem
                        yield Placed(Position(epoch, window, index + offset), document, tokens)
            if not found:
                raise UserError(self._nothing())

    def _documents(self) -> Iterator[Document]:
        """One pass over this part's documents; those that cannot be used belong to every part but the validation."""
        source = self.documents.documents()
        if self.part == "all":
            yield from source
            return
        first: list[Document] = []
        usable = 0
        for document in source:
            first.append(document)
            usable += not document.problem
            if usable == HELD_OUT_EVERY:
                break
        if usable < HELD_OUT_EVERY:
            yield from self._part_of_few(first)
            return
        index = 0
        for document in chain(first, source):
            index += not document.problem
            held_out = not document.problem and index % HELD_OUT_EVERY == 0
            if held_out == (self.part == "validation"):
                yield document

    def _part_of_few(self, documents: list[Document]) -> Iterator[Document]:
        """This part of a small corpus: all but the last tenth of its characters, or that."""
        tail = sum(len(document.text) for document in documents) // HELD_OUT_TAIL
        start = len(documents)
        while tail > 0 and len(documents[start - 1].text) <= tail:
            start -= 1
            tail -= len(documents[start].text)
        before, after = documents[:start], [found for found in documents[start:] if not found.problem]
        unusable = [found for found in documents[start:] if found.problem]
        if tail > 0:
            divided = before.pop()
            text = divided.text
            at = len(text) - tail
            at = text.rfind("\n", at // 2, at) + 1 or at  # at the end of a line, if there is one nearby
            before.append(divided._replace(text=text[:at]))
            after.insert(0, divided._replace(text=text[at:], replaced=0))
        yield from after if self.part == "validation" else before + unusable

    def _nothing(self) -> str:
        if self.part == "validation":
            return f"corpus {self._name} is too small to hold out a part: name a separate validation source."
        return f"corpus {self._name} is empty: it holds no text that can be used."

    def _encode(self, documents: list[Document]) -> list[tuple[Document, np.ndarray]]:
        usable = [document for document in documents if not document.problem]
        try:
            ids = iter(self._ids([document.text for document in usable]))
        except BaseException as error:
            # Tokenizers raise anything about a text, and a panic of Rust is no Exception.
            panic = type(error).__name__ == "PanicException"
            if not panic and (not isinstance(error, Exception) or isinstance(error, MemoryError | OSError)):
                raise
            if len(documents) > 1:
                return [found for document in documents for found in self._encode([document])]
            [document] = documents
            problem = f"{document.where} cannot be tokenized: {first_line(error)}."
            if self.documents.bad == "stop":
                raise BadDocument(problem) from error
            return [(Document("", document.where, problem), np.empty(0, np.int64))]
        end = self.tokenizer.eos_token_id
        return [(document, np.array([] if document.problem else [*next(ids), end], np.int64)) for document in documents]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # Split special tokens: a document that quotes "</s>" must not end there.
        ids: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return ids
