"""Sources of documents: every kind of file reads back what was written, and every mistake is one sentence."""

from __future__ import annotations

import gzip
import io
import json
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data import files, open_documents, stream
from toolkit.errors import UserError

TEXTS = ["First, with\ntwo lines.", "Zweites mit Ümlaut.", "第三 🙂", 'Fourth \\ "quoted"']


def fineweb_row(text: str, number: int) -> dict[str, Any]:
    return {
        "text": text,
        "id": f"<urn:uuid:{number}>",
        "dump": "CC-MAIN-2024-10",
        "url": f"https://example.org/{number}",
        "date": "2024-02-20T10:00:00Z",
        "file_path": "s3://commoncrawl/x.warc.gz",
        "language": "en",
        "language_score": 0.97,
        "token_count": len(text) // 4,
    }


ROWS = [fineweb_row(text, number) for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write_parquet(file: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def error_of(spec: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(open_documents(str(spec), **options))
    message = str(caught.value)
    assert "\n" not in message and message[-1] in ".?"
    return message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("list.json", json.dumps(ROWS, indent=1).encode()),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        # Several frames in one file, as parallel compressors write them.
        ("frames.jsonl.zst", b"".join(zstandard.compress(line) for line in LINES.splitlines(keepends=True))),
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES),
        ("gaps.jsonl", LINES.replace(b"\n", b"\n\n")),
    ],
)
def test_json_reads_back(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    documents = open_documents(str(tmp_path / name))
    assert list(documents) == TEXTS
    assert list(documents) == TEXTS, "a second pass gives the same"


def test_other_json_columns_may_change_type(tmp_path: Path) -> None:
    file = tmp_path / "crawl.jsonl"
    file.write_text('{"text": "a", "meta": 1}\n{"text": "b", "meta": {"x": [1]}}\n{"text": "c"}\n')
    assert list(open_documents(str(file))) == ["a", "b", "c"]


def test_parquet_file_folder_and_glob_agree_and_are_sorted(tmp_path: Path) -> None:
    second = write_parquet(tmp_path / "b.parquet", ROWS[2:])
    first = write_parquet(tmp_path / "a.parquet", ROWS[:2])
    (tmp_path / "README.md").write_text("not data")
    assert list(open_documents(str(first))) + list(open_documents(str(second))) == TEXTS
    assert list(open_documents(str(tmp_path))) == TEXTS
    assert list(open_documents(str(tmp_path / "*.parquet"))) == TEXTS
    assert list(open_documents(str(tmp_path / "[ab].parquet"), text_column="url"))[0] == ROWS[0]["url"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_types_and_missing_texts(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["a", None, "", " \n", "b"]).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert list(open_documents(str(tmp_path))) == ["a", "b"]


def test_text_files_are_cut(tmp_path: Path) -> None:
    book = "".join(f"Paragraph {number} " + "word " * 60 + "\n\n" for number in range(400))
    (tmp_path / "book.txt").write_text(book)
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(b"broken \xff byte"))
    *documents, last = open_documents(str(tmp_path))
    assert "".join(documents) == book
    assert len(documents) > 5
    assert all(document.endswith("\n\n") for document in documents)
    assert all(8 * 1024 < len(document) <= 16 * 1024 + 2 for document in documents[:-1])
    assert last == "broken \N{REPLACEMENT CHARACTER} byte"


@given(st.text(st.sampled_from("ab\n"), max_size=300), st.integers(2, 40))
def test_cut_loses_nothing(text: str, size: int) -> None:
    pieces = list(files.cut(io.StringIO(text), size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size + 1 for piece in pieces)
    for piece in pieces[:-1]:
        assert piece.endswith("\n") or "\n" not in piece[size // 2 :]


def test_stdlib_is_real_source_in_a_fixed_order() -> None:
    documents = open_documents("stdlib")
    first = [text for text, _ in zip(documents, range(50), strict=False)]
    assert first == [text for text, _ in zip(documents, range(50), strict=False)]
    files = stream.stdlib_files()
    assert files == sorted(files) and not any("site-packages" in file.parts for file in files)
    assert {"json", "os.py"} <= {part for file in files for part in file.parts}
    assert "".join(first).startswith(files[0].read_text(errors="replace")[:1000])


def test_fineweb_is_streamed_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call on a clone of the dataset's layout: its config names, its folders, its columns."""
    write_parquet(tmp_path / "sample" / "10BT" / "000.parquet", ROWS[:3])
    write_parquet(tmp_path / "sample" / "100BT" / "000.parquet", ROWS[3:])
    configs = "".join(
        f"- config_name: sample-{size}\n  data_files:\n  - split: train\n    path: sample/{size}/*\n"
        for size in ("10BT", "100BT")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.setattr(stream, "FINEWEB", str(tmp_path))
    assert list(open_documents("fineweb")) == TEXTS[:3]
    assert list(open_documents("fineweb", subset="sample-100BT")) == TEXTS[3:]
    assert "Did you mean 'sample-10BT'?" in error_of("fineweb", subset="sample-10T")
    assert "no column 'txt'" in error_of("fineweb", text_column="txt")
    assert "cannot be opened" in error_of("fineweb", split="test")


def test_fineweb_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    message = error_of("fineweb")
    assert "hub, which cannot be reached" in message and "local parquet files" in message


def test_a_hub_that_answers_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert stream.hub_reachable()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not stream.hub_reachable()
        server.shutdown()


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("finweb", ["unknown data 'finweb'", "'stdlib'", ".parquet", "Did you mean 'fineweb'?"]),
        ("", ["unknown data ''"]),
        ("corpus.parqet", ["no data file or folder 'corpus.parqet'", "Did you mean 'corpus.parquet'?"]),
        ("nowhere/at/all.parquet", ["no data file or folder"]),
        ("corpus*.jsonl", ["no file matches 'corpus*.jsonl'"]),
        ("notes.md", ["'notes.md' is of no supported kind", ".parquet, .arrow, .jsonl"]),
        ("mixed", ["'mixed' mixes 'json', 'parquet' files", "*.parquet"]),
        ("hollow", ["folder 'hollow' holds no data"]),
        ("broken.parquet", ["'broken.parquet'", "corrupt"]),
        ("cut.parquet", ["'cut.parquet'", "corrupt"]),
        ("damaged.parquet", ["'damaged.parquet'", "corrupt"]),
        ("bytes.parquet", ["column 'text' of 'bytes.parquet' holds int64"]),
        ("norows.parquet", ["'norows.parquet' is an empty corpus"]),
        ("empty.jsonl", ["'empty.jsonl' is an empty corpus"]),
        ("blank.txt", ["'blank.txt' is an empty corpus"]),
        ("body.jsonl", ["line 1 of 'body.jsonl' has no column 'text'", "'body'"]),
        ("lately.jsonl", ["line 1 of 'lately.jsonl' has no column 'text'", "'test'", "Did you mean 'test'?"]),
        ("line1.jsonl", ["line 1 of 'line1.jsonl' is not valid JSON"]),
        ("list3.json", ["line 3 of 'list3.json' is not valid JSON"]),
        ("number.jsonl", ["line 1 of 'number.jsonl': 'text' holds a number"]),
        ("words.jsonl", ["line 1 of 'words.jsonl': wanted is an object", "found text"]),
        ("plain.jsonl.gz", ["'plain.jsonl.gz'", "corrupt"]),
        ("short.jsonl.gz", ["'short.jsonl.gz'", "corrupt"]),
        ("plain.jsonl.zst", ["'plain.jsonl.zst'", "corrupt"]),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, parts: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    whole = write_parquet(Path("corpus.parquet")).read_bytes()
    write_parquet(Path("mixed/a.parquet"))
    Path("mixed/b.jsonl").write_bytes(LINES)
    Path("hollow").mkdir()
    files: dict[str, bytes] = {
        "notes.md": b"x",
        "broken.parquet": b"this is no parquet",
        "cut.parquet": whole[: len(whole) // 2],
        "damaged.parquet": whole[:4] + bytes(600) + whole[604:],
        "empty.jsonl": b"",
        "blank.txt": b"\n \n",
        "body.jsonl": b'{"body": "a"}\n',
        "lately.jsonl": b'{"test": "a"}\n' * stream.TRIED + b'{"text": "b"}\n',
        "line1.jsonl": b'{"text": "b"\n',
        "list3.json": b'[{"text": "a"},\n{"text": "b"},\n{"text" "c"}]\n',
        "number.jsonl": b'{"text": 5}\n',
        "words.jsonl": b'"a"\n',
        "plain.jsonl.gz": LINES,
        "short.jsonl.gz": gzip.compress(LINES)[:-20],
        "plain.jsonl.zst": LINES,
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    pq.write_table(pa.table({"text": [1, 2]}), "bytes.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), "norows.parquet")
    message = error_of(spec)
    for part in parts:
        assert part in message


def test_every_parquet_schema_is_checked_before_reading(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    write_parquet(tmp_path / "z.parquet", [{"txt": "a", "url": "b"}])
    with pytest.raises(UserError, match=re.escape("z.parquet' has no column 'text': it has 'txt', 'url'")):
        open_documents(str(tmp_path))


def test_subsets_belong_to_fineweb() -> None:
    assert "'stdlib' has no subsets" in error_of("stdlib", subset="sample-10BT")


def test_real_fineweb(shared_data: Path) -> None:
    folder = shared_data / "fineweb"
    assert len(list(open_documents(str(folder / "fineweb_val.parquet")))) == 310
    rows = pq.read_table(folder / "fineweb_fullschema_rows.parquet").to_pylist()
    assert list(open_documents(str(folder / "*fullschema*.parquet"))) == [row["text"] for row in rows]
    assert rows[0].keys() == ROWS[0].keys(), "the generated stand-ins have FineWeb's columns"


def test_real_json_and_text(shared_data: Path) -> None:
    small = shared_data / "small"
    assert len(list(open_documents(str(small / "c4_demo_300.jsonl")))) == 300
    text = (small / "tinyshakespeare.txt").read_text()
    assert "".join(open_documents(str(small / "tinyshakespeare.txt"))) == text
    assert "mixes" in error_of(small)
