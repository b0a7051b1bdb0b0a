"""Documents that cannot be used: skipped by name and with a count that ranks, stops and resumes do not change."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pack import BYTES, END

from toolkit.data import BadDocument, Documents, PackedTokens, Position, documents, open_documents, rank_batches
from toolkit.data.passes import NAMED
from toolkit.errors import UserError

GOOD = json.dumps({"text": "good", "n": 1})
DEEP = "[" * 100_000 + "]" * 100_000

UNREAD = {
    "integer": f'{{"id": {"9" * 5000}, "text": "good"}}',
    "deep list": f'{{"x": {DEEP}, "text": "good"}}',
    "deep object": '{"x": ' + '{"x":' * 5000 + "1" + "}" * 5000 + ', "text": "good"}',
    "surrogate": '{"x": "\\ud83d", "text": "good"}',
    "quoted": f'{{"x": {DEEP}, "y": "]]}}}}\\\\\\"[[", "text": "good"}}',
    "not a number": '{"x": NaN, "y": -Infinity, "z": 1e999999, "text": "good"}',
    "pair": '{"x": "\\ud83d\\ude42", "text": "good"}',
}
BAD = {
    "surrogate": ('{"text": "cut \\ud83d"}', "half of a surrogate pair (\\ud83d)"),
    "more": ('{"text": "a"}{"text": "b"}', "not valid JSON"),
    "number": ('{"text": 5}', "'text' holds a number, not text"),
    "integer": (f'{{"text": {"9" * 5000}}}', "'text' holds a number, not text"),
    "boolean": ('{"text": true}', "'text' holds true or false, not text"),
    "deep": (f'{{"text": {"[" * 90}{"]" * 90}}}', "'text' holds a list, not text"),
    "missing": ('{"body": "x"}', "has no column 'text': it has 'body'"),
    "no object": ("[1]", "wanted is an object"),
    "no JSON": ('{"text": "a"', "is not valid JSON"),
    "unclosed": ("[" * 100_000, "is not valid JSON"),
    "binary": ("\x00\x01", "is not valid JSON"),
}


def write(file: Path, lines: list[str]) -> Path:
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_beside_the_text_is_not_looked_at(tmp_path: Path, name: str) -> None:
    corpus = open_documents(str(write(tmp_path / "x.jsonl", [GOOD, UNREAD[name], GOOD])))
    assert [found.text for found in corpus.documents()] == ["good"] * 3
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "x.json").write_text(f"[{GOOD},\n{UNREAD[name]}]")
    assert list(open_documents(str(tmp_path))) == ["good"] * 2


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_skipped_by_name_or_stops(tmp_path: Path, name: str) -> None:
    line, problem = BAD[name]
    file = write(tmp_path / "x.jsonl", [GOOD, line, GOOD])
    assert list(open_documents(str(file))) == ["good", "good"]
    [bad] = [found for found in open_documents(str(file)).documents() if found.problem]
    assert bad.problem.startswith(f"line 2 of {str(file)!r}") and problem in bad.problem and "\n" not in bad.problem
    with pytest.raises(BadDocument, match="--bad-documents skip"):
        list(open_documents(str(file), bad="stop"))
    alone = write(tmp_path / "alone.jsonl", [line])
    with pytest.raises(UserError, match=r"(line \d|record 1) of"):
        open_documents(str(alone))


@pytest.mark.parametrize("depth", [95, 105, 900, 990, 1000, 1010])
def test_how_deep_a_line_may_nest_does_not_depend_on_who_reads(tmp_path: Path, depth: int) -> None:
    file = write(tmp_path / "x.jsonl", [f'{{"x": {"[" * depth}{"]" * depth}, "text": "good"}}'])

    def called_from(level: int) -> list[str]:
        return called_from(level - 1) if level else list(open_documents(str(file)))

    assert called_from(0) == called_from(500) == ["good"]


def packing(name: str) -> Callable[[bytes], bytes]:
    return {"gz": gzip.compress, "zst": zstandard.compress}[name]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_the_rest_of_a_file_that_was_cut_short_is_skipped(tmp_path: Path, kind: str) -> None:
    lines = [json.dumps({"text": f"{n} {hash(str(n))}"}) for n in range(20_000)]
    packed = packing(kind)("\n".join(lines).encode())
    (tmp_path / f"a.jsonl.{kind}").write_bytes(packed[: len(packed) // 2])
    (tmp_path / f"b.jsonl.{kind}").write_bytes(packing(kind)(GOOD.encode()))
    *found, bad, last = open_documents(str(tmp_path)).documents()
    assert last.text == "good" and 5_000 < len(found) < 15_000
    assert [one.text for one in found] == [json.loads(line)["text"] for line in lines[: len(found)]]
    assert bad.problem.startswith(f"data file {str(tmp_path / f'a.jsonl.{kind}')!r} is corrupt after {found[-1].where}")


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_line_that_grows_is_skipped_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(documents, "LONGEST", 1 << 16)
    bomb = b'{"text": "' + b" a" * (1 << 22) + b'"}\n'
    (tmp_path / f"x.jsonl.{kind}").write_bytes(packing(kind)(GOOD.encode() + b"\n" + bomb + GOOD.encode() + b"\n"))
    corpus = open_documents(str(tmp_path))
    tracemalloc.start()
    try:
        good, bad, more = corpus.documents()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (good.text, more.text) == ("good", "good") and "line 2 of" in bad.problem and "65,536" in bad.problem
    assert peak < len(bomb)


def test_a_document_that_is_too_long_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST", 100)
    pq.write_table(pa.table({"text": ["good", "x" * 101, "y" * 100]}), tmp_path / "x.parquet")
    assert [found.text for found in open_documents(str(tmp_path)).documents()] == ["good", "", "y" * 100]


def test_a_damaged_row_group_leaves_the_others(tmp_path: Path) -> None:
    texts = [f"{n} {'x' * 50}" for n in range(300)]
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": texts}), file, row_group_size=100, compression="snappy", use_dictionary=False)
    place = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[place : place + 60] = bytes(60)
    file.write_bytes(content)
    found = list(open_documents(str(file)).documents())
    assert [one.text for one in found if not one.problem] == texts[:100] + texts[200:]
    [bad] = [one.problem for one in found if one.problem]
    assert bad.startswith(f"rows 101 to 200 of {str(file)!r} are corrupt: ")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_bytes_of_parquet_that_are_no_text_are_replaced(tmp_path: Path, kind: pa.DataType) -> None:
    raw = pa.array([b"good", b"a \xff\xff b", None], pa.binary())
    column = raw.dictionary_encode() if pa.types.is_dictionary(kind) else raw
    if pa.types.is_dictionary(kind):
        column = pa.DictionaryArray.from_arrays(column.indices, column.dictionary.view(pa.string()))
    else:
        column = raw.view(pa.string()).cast(kind, safe=False) if kind == pa.string() else raw.cast(pa.large_binary())
        column = column if kind == pa.string() else column.view(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    good, replaced = open_documents(str(tmp_path)).documents()
    assert (good.text, good.replaced, replaced.text, replaced.replaced) == ("good", 0, "a \ufffd\ufffd b", 2)


ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
TEXT = "Ümlaut 第三 🙂\nsecond line\n"


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_byte_order_mark_chooses_the_encoding(tmp_path: Path, encoding: str, compression: str) -> None:
    pack = packing(compression[1:]) if compression else bytes
    text, lines = TEXT, json.dumps({"text": TEXT}, ensure_ascii=False) + "\n" + GOOD + "\n"
    (tmp_path / f"x.txt{compression}").write_bytes(pack(ENCODINGS[encoding] + text.encode(encoding)))
    (tmp_path / f"x.jsonl{compression}").write_bytes(pack(ENCODINGS[encoding] + lines.encode(encoding)))
    found = list(open_documents(str(tmp_path / f"x.txt{compression}")).documents())
    assert [(one.text, one.replaced) for one in found] == [(TEXT, 0)]
    assert list(open_documents(str(tmp_path / f"x.jsonl{compression}"))) == [TEXT, "good"]


@pytest.mark.parametrize(
    ("content", "text", "replaced"),
    [
        (b"a \xff b \xe2\x82 c", "a \ufffd b \ufffd c", 2),
        ("already \ufffd there".encode(), "already \ufffd there", 0),
        (b"half a pair \xed\xa0\xbd", "half a pair \ufffd\ufffd\ufffd", 3),
        (codecs.BOM_UTF16_LE + "a".encode("utf-16-le") + b"\x3d\xd8" + "b".encode("utf-16-le"), "a\ufffdb", 1),
        (codecs.BOM_UTF16_LE + "a".encode("utf-16-le") + b"x", "a\ufffd", 1),
        (codecs.BOM_UTF32_BE + "a".encode("utf-32-be") + b"\x7f\xff\xff\xff", "a\ufffd", 1),
    ],
)
def test_replaced_characters_are_counted(tmp_path: Path, content: bytes, text: str, replaced: int) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    [found] = open_documents(str(tmp_path)).documents()
    assert (found.text, found.replaced) == (text, replaced)
    if not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF32_BE)):
        assert text == content.decode(errors="replace")
        (tmp_path / "x.txt").rename(tmp_path / "x.jsonl")
        (tmp_path / "x.jsonl").write_bytes(b'{"x": "\xff", "text": "' + content + b'"}')
        [found] = open_documents(str(tmp_path)).documents()
        assert (found.text, found.replaced) == (text, replaced), "what is beside the text does not count"


def test_what_is_hidden_or_no_file_is_not_data(tmp_path: Path) -> None:
    for place in (".ipynb_checkpoints/a-checkpoint.jsonl", ".git/x/b.jsonl", "deep/._c.jsonl", "deep/.cache/d.jsonl"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    write(tmp_path / "deep" / "e.jsonl", [GOOD])
    assert list(open_documents(str(tmp_path))) == ["good"]
    assert list(open_documents(str(tmp_path / "**" / "*.jsonl"))) == ["good"]
    with pytest.raises(UserError, match="neither a file nor a folder"):
        open_documents(str(tmp_path / "pipe.jsonl"))
    # The folder itself may lie in a hidden one.
    hidden = tmp_path / ".data"
    hidden.mkdir()
    write(hidden / "f.jsonl", [GOOD])
    assert list(open_documents(str(hidden))) == ["good"]


# ---- the stream of tokens -----------------------------------------------------------------------------------------


class Choosy:
    """BYTES, except that it fails at texts with a "!", as tokenizers without an entry for unknown words do."""

    eos_token_id = END

    def __call__(self, texts: list[str], **options: Any) -> Any:
        if any("!" in text for text in texts):
            raise Exception("WordLevel error: Missing [UNK] token from the vocabulary")
        return BYTES(texts, **options)


pieces = st.sampled_from(["a", "bcd", "efghij" * 3, "!x", "half \ud83d", "b\udcff", ""])


def packed(texts: list[str], seed: int, window: int) -> PackedTokens:
    def read() -> Iterator[str]:
        return iter(texts)

    corpus = Documents("x", read)
    return PackedTokens(corpus, Choosy(), 6, seed=seed, shuffle_window=window, sequence_window=3)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(st.lists(pieces, min_size=1, max_size=14), st.integers(0, 9), st.integers(1, 5), st.integers(0, 40))
def test_counts_and_places_survive_a_stop_anywhere(texts: list[str], seed: int, window: int, made: int) -> None:
    usable = [text for text in texts if text and "!" not in text and "\ud83d" not in text]
    if not usable:
        with pytest.raises(UserError, match="no text that can be used"):
            next(packed(texts, seed, window).sequences())
        return
    whole = packed(texts, seed, window)
    stream = whole.sequences()
    for _ in islice(stream, made):
        pass
    # As a checkpoint keeps it.
    noted = Position(**json.loads(json.dumps(asdict(whole.position))))
    assert noted == whole.position
    resumed = packed(texts, seed, window)
    following = resumed.sequences(noted)
    for mine, theirs in islice(zip(stream, following, strict=False), 30):
        assert np.array_equal(mine, theirs)
        assert (whole.position, whole.read_to) == (resumed.position, resumed.read_to)
    bad = sum("!" in text or "\ud83d" in text for text in texts)
    if whole.position.epoch > 0:
        assert whole.read_to.skipped == bad and len(whole.read_to.named) == min(bad, NAMED)
        assert whole.read_to.replaced == sum(text.count("\udcff") for text in texts)


def test_every_number_of_ranks_counts_the_same(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {n} " * 5}) for n in range(60)]
    lines[7] = '{"text": "\\ud83d"}'
    lines[30] = "no JSON"
    file = write(tmp_path / "x.jsonl", lines)
    seen = set()
    for world in (1, 2, 3, 4):
        for rank in range(world):
            corpus = open_documents(str(file))
            stream = PackedTokens(corpus, BYTES, 16, seed=0, shuffle_window=20, sequence_window=12)
            batches = rank_batches(stream, rank=rank, world_size=world, micro_batch=12 // world)
            for _ in range(4):
                next(batches)
            seen.add((batches.position, batches.read_to))
            batches.close()
    [(_, read_to)] = seen
    assert read_to.skipped == len(read_to.named) > 0


@pytest.mark.parametrize("text", ["half \ud83d", "!"])
def test_a_bad_document_may_stop_the_stream(text: str) -> None:
    corpus = Documents("x", lambda: iter(["good"] * 3 + [text]), bad="stop")
    with pytest.raises(BadDocument, match=r"^document 4 of 'x' .*\. --bad-documents skip"):
        next(PackedTokens(corpus, Choosy(), 99, seed=0, shuffle_window=1).sequences())  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_another_encoding_without_its_mark_is_not_read_as_text_with_zeros(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(("An ordinary sentence.\n" * 50).encode(encoding))
    with pytest.raises(UserError, match="NUL characters"):
        open_documents(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_compressed_file_under_the_name_of_a_text_is_named(tmp_path: Path, name: str) -> None:
    packed = gzip.compress(b"text\n" * 100)
    (tmp_path / name).write_bytes(gzip.compress(packed) if name.endswith(".gz") else packed)
    with pytest.raises(UserError, match=r"it is no text, but a gzip file"):
        open_documents(str(tmp_path / name))


def test_names_in_capitals_are_data_too(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("first")
    (tmp_path / "B.TXT.GZ").write_bytes(gzip.compress(b"second"))
    assert list(open_documents(str(tmp_path))) == ["first", "second"]


def test_a_column_that_is_there_twice_and_a_name_too_long_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="more than one column 'text'"):
        open_documents(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="File name too long"):
        open_documents(str(tmp_path / ("a" * 300 + ".txt")))
