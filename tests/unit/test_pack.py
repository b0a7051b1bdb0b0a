"""Packing: no token lost, none padded, and an order that the seed alone decides."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from toolkit.data import Documents, PackedTokens, Position, load_tokenizer, open_documents, rank_batches
from toolkit.data.tokenizers import END_OF_TEXT, train_bytes_bpe
from toolkit.errors import UserError

# Entry 0 is the end of text; with no more entries than bytes, a document's tokens are its bytes.
BYTES: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
    tokenizer_object=train_bytes_bpe([""], 257), eos_token=END_OF_TEXT
)
END = BYTES.eos_token_id

corpora = st.lists(st.text("abcdef", min_size=1, max_size=30), min_size=1, max_size=12)
lengths = st.integers(1, 20)
windows = st.integers(1, 5)
seeds = st.integers(0, 2**63 - 1)


def packed(documents: Any, seq_len: int, seed: int = 0, **options: Any) -> PackedTokens:
    """Sequences in the order of the documents, unless `options` says otherwise."""
    return PackedTokens(documents, BYTES, seq_len, seed=seed, **({"sequence_window": 1} | options))


def tokens_of(text: str) -> list[int]:
    return [*BYTES(text)["input_ids"], END]


def take(stream: Iterator[Any], number: int) -> list[list[int]]:
    return [block.tolist() for block in islice(stream, number)]


def joined(blocks: list[list[int]]) -> list[int]:
    """The token stream the blocks were cut from: each starts with the last token of the one before."""
    for before, after in zip(blocks, blocks[1:], strict=False):
        assert before[-1] == after[0]
    return blocks[0][:1] + [token for block in blocks for token in block[1:]]


def documents_of(tokens: list[int]) -> list[list[int]]:
    """The whole documents in a token stream."""
    ends = [place for place, token in enumerate(tokens) if token == END]
    starts = [0, *(end + 1 for end in ends)]
    return [tokens[start : end + 1] for start, end in zip(starts, ends, strict=False)]


@settings(deadline=None)
@given(corpora, lengths, seeds, windows)
def test_blocks_are_the_documents_and_nothing_else(corpus: list[str], seq_len: int, seed: int, window: int) -> None:
    epoch = sum(len(tokens_of(text)) for text in corpus)
    blocks = take(packed(corpus, seq_len, seed, shuffle_window=window).sequences(), 2 * epoch // seq_len + 1)
    assert all(len(block) == seq_len + 1 for block in blocks)
    found = documents_of(joined(blocks))
    for number in range(2):
        one_epoch = found[number * len(corpus) : (number + 1) * len(corpus)]
        for first in range(0, len(corpus), window):
            expected = sorted(tokens_of(text) for text in corpus[first : first + window])
            assert sorted(one_epoch[first : first + window]) == expected


@settings(deadline=None)
@given(corpora, lengths)
def test_a_window_of_one_keeps_the_source_order(corpus: list[str], seq_len: int) -> None:
    expected = [token for _ in range(3) for text in corpus for token in tokens_of(text)]
    number = (len(expected) - 1) // seq_len
    blocks = take(packed(corpus, seq_len, shuffle_window=1).sequences(), number)
    if number:
        assert joined(blocks) == expected[: number * seq_len + 1]


@settings(deadline=None)
@given(corpora, lengths, seeds, windows, st.integers(1, 3), st.integers(1, 4))
def test_ranks_share_the_global_stream(
    corpus: list[str], seq_len: int, seed: int, window: int, micro_batch: int, world_size: int
) -> None:
    """Disjoint and, put together, the stream itself: the same sequences in every global batch."""

    def stream() -> PackedTokens:
        return packed(corpus, seq_len, seed, shuffle_window=window, sequence_window=2 * window)

    expected = take(stream().sequences(), 12 * micro_batch)
    ranks = [
        rank_batches(stream(), rank=rank, world_size=world_size, micro_batch=micro_batch) for rank in range(world_size)
    ]
    together: list[list[int]] = []
    for _ in range(12 // world_size):
        for batches in ranks:
            batch = next(batches)
            assert batch.dtype == torch.int64 and batch.shape == (micro_batch, seq_len + 1)
            together += batch.tolist()
    assert together == expected
    for batches in ranks:
        batches.close()


@settings(deadline=None)
@given(corpora, lengths, seeds, windows, st.integers(0, 30))
def test_a_position_says_all_that_follows(
    corpus: list[str], seq_len: int, seed: int, window: int, given_out: int
) -> None:
    first = packed(corpus, seq_len, seed, shuffle_window=window, sequence_window=2 * window)
    stream = first.sequences()
    take(stream, given_out)
    second = packed(corpus, seq_len, seed, shuffle_window=window, sequence_window=2 * window)
    assert take(second.sequences(first.position), 10) == take(stream, 10)
    assert second.position == first.position


@settings(deadline=None)
@given(corpora, lengths, seeds, st.integers(1, 7))
def test_groups_of_sequences_are_mixed_and_complete(corpus: list[str], seq_len: int, seed: int, group: int) -> None:
    in_order = take(packed(corpus, seq_len, seed).sequences(), 3 * group)
    mixed = take(packed(corpus, seq_len, seed, sequence_window=group).sequences(), 3 * group)
    for first in range(0, 3 * group, group):
        assert sorted(mixed[first : first + group]) == sorted(in_order[first : first + group])


def test_a_long_document_does_not_fill_a_batch_alone() -> None:
    corpus = ["a" * 4000, "b" * 4000, "c" * 4000, "d" * 4000]
    batch = take(packed(corpus, 50, sequence_window=256).sequences(), 32)
    assert len({tuple(sequence) for sequence in batch}) > 2


@settings(deadline=None)
@given(corpora, lengths, seeds, st.integers(1, 40))
def test_the_first_pass_ends_where_the_documents_repeat(corpus: list[str], seq_len: int, seed: int, most: int) -> None:
    stream = packed(corpus, seq_len, seed)
    found = [sequence.tolist() for sequence in stream.first_pass(most)]
    assert found == take(packed(corpus, seq_len, seed).sequences(), len(found))
    tokens = sum(len(tokens_of(text)) for text in corpus)
    assert 1 <= len(found) <= most
    assert (len(found) - 1) * seq_len < tokens


def corpus_of(number: int) -> list[str]:
    return [f"document {index}" for index in range(number)]


def test_the_seed_decides_the_order() -> None:
    def order(seed: int) -> list[list[int]]:
        return take(packed(corpus_of(50), 16, seed).sequences(), 30)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_each_epoch_and_window_has_its_own_order() -> None:
    stream = packed(corpus_of(40), 16, shuffle_window=20)
    found = documents_of(joined(take(stream.sequences(), 100)))
    numbers = [int(str(BYTES.decode(tokens[:-1])).split()[-1]) % 20 for tokens in found]
    orders = [numbers[at : at + 20] for at in (0, 20, 40, 60)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(20)) for order in orders)


def test_epoch_and_position_count_on() -> None:
    stream = packed(["abc", "de"], 3, shuffle_window=1)  # a b c END d e END, then again
    assert stream.position.epoch == 0
    seen = []
    for _ in islice(stream.sequences(), 4):
        seen.append(stream.position)
    assert seen == [Position(0, 0, 0, 3), Position(0, 1, 0, 2), Position(1, 0, 0, 2), Position(1, 1, 0, 1)]
    assert stream.position.epoch == 1


def test_validation_is_every_hundredth_document() -> None:
    corpus = corpus_of(250)

    def texts(part: Any) -> list[str]:
        stream = packed(corpus, 64, part=part, shuffle_window=1)
        wanted = {"all": 250, "train": 248, "validation": 2}[part]
        found: list[str] = []
        blocks: list[list[int]] = []
        for block in stream.sequences():
            blocks.append(block.tolist())
            found = [str(BYTES.decode(tokens[:-1])) for tokens in documents_of(joined(blocks))]
            if len(found) >= wanted:
                break
        return found[:wanted]

    assert texts("validation") == [corpus[99], corpus[199]]
    assert texts("all") == corpus
    assert texts("train") == [text for text in corpus if text not in (corpus[99], corpus[199])]


@pytest.mark.parametrize("number", [1, 2, 30, 99])
def test_a_small_corpus_holds_out_the_last_tenth_of_its_characters(number: int) -> None:
    corpus = [f"{index}: some words\n" * (1000 // number) for index in range(number)]
    whole = "".join(corpus)

    def text(part: Any) -> str:
        return "".join(found.text for found in packed(corpus, 8, part=part)._documents())

    train, validation = text("train"), text("validation")
    assert train + validation == whole and train.endswith("\n")
    assert len(whole) // 10 <= len(validation) <= len(whole) // 10 + len(f"{number}: some words\n")
    assert train + validation == text("all")


def test_the_tail_of_a_small_corpus_is_cut_anywhere_where_it_has_no_lines() -> None:
    assert ["".join(d.text for d in packed(["ab" * 50], 8, part=p)._documents()) for p in ("train", "validation")] == [
        "ab" * 45,
        "ab" * 5,
    ]
    with pytest.raises(UserError, match="'given' is too small to hold out a part.*separate validation source"):
        packed(["abcdefghi"], 1, part="validation").require(1)


def test_an_empty_corpus_ends_instead_of_looping() -> None:
    with pytest.raises(UserError, match="is empty"):
        next(packed([], 8).sequences())
    with pytest.raises(UserError, match="is empty"):
        next(packed(["half \ud83d"], 8).sequences())


@settings(deadline=None)
@given(corpora, lengths)
def test_require_counts_full_sequences(corpus: list[str], seq_len: int) -> None:
    full = (sum(len(tokens_of(text)) for text in corpus) - 1) // seq_len
    stream = packed(corpus, seq_len)
    stream.require(full)
    with pytest.raises(UserError, match=rf"smaller than one batch: it has {full} full .* needs {full + 1}\."):
        stream.require(full + 1)
    assert stream.position == Position(), "a check is not a read"


def test_require_reads_no_more_than_it_must() -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "some text"

    packed(Documents("stream", endless), 8, shuffle_window=32).require(10)
    assert read <= 32


@pytest.mark.parametrize(
    ("seq_len", "options", "message"),
    [
        (0, {"seed": 0}, "seq_len is 0, but must be at least 1"),
        (8, {"seed": -1}, "seed is -1, but must be at least 0"),
        (8, {"seed": 0, "shuffle_window": 0}, "shuffle_window is 0"),
    ],
)
def test_numbers_out_of_range(seq_len: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PackedTokens(["a"], BYTES, seq_len, **options)  # type: ignore[arg-type]


def test_a_quoted_end_of_text_ends_nothing() -> None:
    blocks = take(packed([f"a{END_OF_TEXT}b"], 8, shuffle_window=1).sequences(), 2)
    assert joined(blocks).count(END) == 1


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_the_threads_work_ahead_only_so_far_and_end_with_the_iterator() -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "0123456"

    batches = rank_batches(
        packed(Documents("stream", endless), 8, shuffle_window=1), rank=0, world_size=1, micro_batch=1
    )
    assert not data_threads(), "nothing runs before the first batch is wanted"
    next(batches)
    assert len(data_threads()) == 2, "one makes groups, one batches of them"
    batches.close()
    assert not data_threads()
    assert read < 20


def test_an_error_in_the_thread_reaches_the_consumer() -> None:
    def breaks() -> Iterator[str]:
        yield from corpus_of(3)
        raise UserError("the file went away.")

    batches = rank_batches(packed(Documents("x", breaks), 8, shuffle_window=1), rank=0, world_size=1, micro_batch=1)
    given_out = 0
    with pytest.raises(UserError, match=r"^the file went away\.$"):
        for _ in batches:
            given_out += 1
    assert given_out == (sum(len(tokens_of(text)) for text in corpus_of(3)) - 1) // 8
    assert not data_threads()


def test_real_fineweb(shared_data: Path) -> None:
    """Every token of real documents arrives, and a thousand-token sequence reads as the text it was."""
    tokenizer = load_tokenizer("mistral-32k")
    documents = open_documents(str(shared_data / "fineweb" / "fineweb_val.parquet"))
    stream = PackedTokens(documents, tokenizer, 1024, seed=0, shuffle_window=1, sequence_window=1)
    tokens = np.concatenate([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in islice(documents, 40)])
    number = (len(tokens) - 1) // 1024
    assert joined(take(stream.sequences(), number)) == tokens[: number * 1024 + 1].tolist()
    held_out = PackedTokens(documents, tokenizer, 1024, seed=0, part="validation")
    held_out.require(1)
    with pytest.raises(UserError, match="smaller than one batch"):
        held_out.require(10_000)


@pytest.mark.parametrize("worlds", [(1, 1, 1), (2, 2, 2), (1, 3, 2), (4, 1, 2)])
def test_every_document_is_seen_once_through_stops_and_other_numbers_of_ranks(worlds: tuple[int, int, int]) -> None:
    """Stopped twice, across the ends of epochs: the documents' ids come as in a stream that nobody stopped."""
    documents = Documents("ids", lambda: (f"{n} " * (n % 7 + 1) for n in range(90)))
    fresh = lambda: packed(documents, 8, shuffle_window=16, sequence_window=4)  # noqa: E731
    total, steps = 12, (3, 9, 20)
    whole = [next_rows for next_rows, _ in zip(fresh().sequences(), range(total * sum(steps)), strict=False)]
    position, rows, epochs = None, [], set()
    for world, count in zip(worlds, steps, strict=True):
        share = total // world
        ranks = [
            rank_batches(fresh(), rank=rank, world_size=world, micro_batch=share, start=position)
            for rank in range(world)
        ]
        for _ in range(count):
            for batches in ranks:
                rows += list(next(batches).numpy())
            assert len({batches.position for batches in ranks}) == 1
        position = ranks[0].position
        epochs.add(position.epoch)
        for batches in ranks:
            batches.close()
    assert np.array_equal(np.stack(rows), np.stack(whole))
    assert len(epochs) > 1


@given(corpora, lengths)
def test_one_pass_gives_every_token_and_the_bytes_that_they_stand_for(corpus: list[str], seq_len: int) -> None:
    blocks = [block.tolist() for block in packed(corpus, seq_len, shuffle_window=1).once()]
    stream = [token for text in corpus for token in tokens_of(text)]
    assert all(len(block) == seq_len + 1 for block in blocks[:-1]) and 1 < len(blocks[-1]) <= seq_len + 1
    assert joined(blocks) == stream
    reads = list[int]()

    def corpus_read() -> Iterator[str]:
        reads.append(1)
        return iter(corpus)

    for number in range(1, len(blocks) + 1):
        one = packed(Documents("counted", corpus_read), seq_len, shuffle_window=1)
        predicted = sum(len(block) - 1 for block in islice(one.once(), number))
        assert one.text_bytes() == sum(token != END for token in stream[1 : predicted + 1])
        assert len(reads) <= 2, "once, and to see whether there is more"
        reads.clear()


def test_bytes_are_those_of_the_text_whatever_its_characters() -> None:
    corpus = ["naïve Größe", "数学 \N{SNOWMAN}"]
    whole = sum(len(text.encode()) for text in corpus)
    tokenizer = load_tokenizer("mistral-32k")
    tokens = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in corpus]
    found = PackedTokens(corpus, tokenizer, tokens[0] - 1, seed=0, shuffle_window=1)
    first = len(tokenizer.decode(tokenizer(corpus[0], add_special_tokens=False)["input_ids"][:1]).encode())
    assert list(found.once()) and found.text_bytes() == whole - first
    assert next(found.once()).shape == (tokens[0],) and found.text_bytes() == len(corpus[0].encode()) - first
