"""Documents to full sequences of tokens, in an order that depends on the seed alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch

from toolkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Every 100th document is held out. A streamed corpus has no known length that the rule could depend on.
HELD_OUT_EVERY = 100
ENCODE_TOGETHER = 64
BATCHES_AHEAD = 4

Part = Literal["all", "train", "validation"]
T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """Sequence number `mixed` of the group that starts at token `offset` of document `index` of `window`.

    Document and sequence are counted after shuffling. Together with the documents, the tokenizer and the seed
    it fixes everything that follows.
    """

    epoch: int = 0
    window: int = 0
    index: int = 0
    offset: int = 0
    mixed: int = 0


class PackedTokens:
    """The endless stream of packed sequences that a corpus gives.

    Documents are taken in windows of `shuffle_window`, each window in an order drawn from (seed, epoch,
    window number): neither the number of ranks nor the micro-batch has a part in it. Each document is
    tokenized without special tokens and closed by the end-of-text token; the tokens are cut into sequences
    of `seq_len` + 1, each of which starts with the last token of the one before. So every token but the very
    first is predicted exactly once, nothing is padded, and at the end of the corpus the next epoch goes on in
    the middle of a sequence. Groups of `sequence_window` sequences are then handed out in shuffled order, so that
    a long document does not fill a batch alone.

    Args:
        documents: the corpus; iterated once per epoch, always in the same order.
        tokenizer: any transformers tokenizer with an `eos_token_id`.
        seq_len: predictions per sequence.
        seed: fixes the order, at least 0.
        part: ``validation`` is every 100th document in source order, ``train`` the others, ``all`` both.
        shuffle_window: documents that are shuffled among each other; 1 keeps the source order.
        sequence_window: sequences that are shuffled among each other; 1 keeps the order of the documents.

    Raises:
        UserError: a number out of range; while reading, a part without any document.
    """

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
        self.documents = documents
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.part = part
        self.shuffle_window = shuffle_window
        self.sequence_window = sequence_window
        self.position = Position()

    def sequences(self, start: Position | None = None) -> Iterator[np.ndarray]:
        """The sequences from `start` (the beginning if None) on, without end: int64 arrays [seq_len + 1].

        Before each is handed out, `position` moves to the one after it.
        """
        start = start or Position()
        self.position = start
        group_start = replace(start, mixed=0)
        given_out = start.mixed
        stream = self._in_order(group_start)
        while True:
            group = list(islice(stream, self.sequence_window))
            next_start = group[-1][0]
            order = np.random.default_rng((self.seed, *astuple(group_start))).permutation(len(group))
            for number in range(given_out, len(group)):
                last = number + 1 == len(group)
                self.position = next_start if last else replace(group_start, mixed=number + 1)
                yield group[order[number]][1]
            group_start, given_out = next_start, 0

    def first_pass(self, most: int) -> list[np.ndarray]:
        """Up to `most` sequences that begin before the documents repeat, in the order of the documents."""
        found: list[np.ndarray] = []
        for following, sequence in self._in_order(Position()):
            found.append(sequence)
            if len(found) == most or following.epoch > 0:
                break
        return found

    def _in_order(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """The sequences before they are mixed, each with where the one after it starts."""
        size = self.seq_len + 1
        block = np.empty(size, np.int64)
        filled = 0
        for document, tokens in self._tokenized(start):
            taken = start.offset if document == replace(start, offset=0) else 0
            while taken < len(tokens):
                piece = tokens[taken : taken + size - filled]
                block[filled : filled + len(piece)] = piece
                filled += len(piece)
                taken += len(piece)
                if filled == size:
                    yield replace(document, offset=taken - 1), block.copy()
                    block[0] = block[-1]
                    filled = 1

    def require(self, sequences: int) -> None:
        """Check that one pass over the documents fills `sequences` sequences; tokenizes only until it does.

        Raises:
            UserError: it does not.
        """
        needed = sequences * self.seq_len + 1
        tokens = 0
        for document, ids in self._tokenized(Position()):
            if document.epoch > 0:
                full = max(tokens - 1, 0) // self.seq_len
                raise UserError(
                    f"corpus {self._name} is smaller than one batch: it has {full} full sequences of "
                    f"{self.seq_len} tokens, the global batch needs {sequences}."
                )
            tokens += len(ids)
            if tokens >= needed:
                return

    @property
    def _name(self) -> str:
        return repr(getattr(self.documents, "name", "given"))

    def _tokenized(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Each document's place and tokens, end of text included, from the document of `start` on."""
        for epoch in count(start.epoch):
            source = self._documents()
            for window in count():
                texts = list(islice(source, self.shuffle_window))
                if not texts and window == 0:
                    raise UserError(self._nothing())
                if not texts:
                    break
                if (epoch, window) < (start.epoch, start.window):
                    continue
                first = start.index if (epoch, window) == (start.epoch, start.window) else 0
                order = np.random.default_rng((self.seed, epoch, window)).permutation(len(texts))
                for index in range(first, len(texts), ENCODE_TOGETHER):
                    some = [texts[i] for i in order[index : index + ENCODE_TOGETHER]]
                    for offset, tokens in enumerate(self._encode(some)):
                        yield Position(epoch, window, index + offset), tokens

    def _documents(self) -> Iterator[str]:
        for index, text in enumerate(self.documents):
            held_out = index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            if self.part == "all" or held_out == (self.part == "validation"):
                yield text

    def _nothing(self) -> str:
        if self.part == "validation":
            return (
                f"corpus {self._name} has fewer than {HELD_OUT_EVERY} documents, too few to hold out a part "
                "for validation: name a separate validation source."
            )
        return f"corpus {self._name} is empty: it holds no text."

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        # Split special tokens: a document that quotes "</s>" must not end there.
        ids = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return [np.array([*document, self.tokenizer.eos_token_id], np.int64) for document in ids]


class Batches:
    """One rank's micro-batches, without end: int64 tensors [micro_batch, seq_len + 1] on the CPU.

    `position` is where the stream goes on after the latest one. A background thread works a few batches ahead; an
    error in it is raised here, at the batch it prevented. `close` ends the thread.
    """

    def __init__(self, ahead: Generator[tuple[torch.Tensor, Position]], start: Position) -> None:
        self._ahead = ahead
        self.position = start

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> torch.Tensor:
        tokens, self.position = next(self._ahead)
        return tokens

    def close(self) -> None:
        self._ahead.close()


def rank_batches(
    packed: PackedTokens, *, rank: int, world_size: int, micro_batch: int, start: Position | None = None
) -> Batches:
    """This rank's micro-batches from `start` on, the beginning of the stream if None.

    Micro-step k of rank r takes the sequences (k * world_size + r) * micro_batch + j, j < micro_batch, of the
    global stream: ranks see disjoint data, and a global batch holds the same sequences at every world size. So
    does what follows a `position`, the same on every rank, whatever the number of ranks before and after it.
    The price is that every rank tokenizes the whole stream: what one process tokenizes bounds the speed of all.
    """
    first = start or Position()

    def batches() -> Iterator[tuple[torch.Tensor, Position]]:
        stream = packed.sequences(first)
        while True:
            step = islice(stream, world_size * micro_batch)
            mine = [tokens for place, tokens in enumerate(step) if place // micro_batch == rank]
            yield torch.from_numpy(np.stack(mine)), packed.position

    return Batches(_ahead(batches(), BATCHES_AHEAD), first)


def _ahead(items: Iterator[T], depth: int) -> Generator[T]:
    """The endless `items`, worked out `depth` ahead by a thread that lives as long as this iterator."""
    worker = ThreadPoolExecutor(1, thread_name_prefix="data")
    try:
        pending: deque[Future[T]] = deque(worker.submit(next, items) for _ in range(depth))
        while True:
            pending.append(worker.submit(next, items))
            yield pending.popleft().result()
    finally:
        worker.shutdown(cancel_futures=True)
