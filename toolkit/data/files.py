"""Local files to documents: parquet, Arrow, JSON and plain text, compressed or not.

Only a file that cannot be opened, or a device that cannot be read, ends a pass. What is no document is handed out as
one with a problem, and so is the rest of a damaged file. Memory is bounded by `LONGEST`, whatever a file grows to.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from toolkit.data import documents
from toolkit.data.documents import UNDECODED, Document, document
from toolkit.errors import UserError, nearest, some
from toolkit.sentences import json_kind

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".txt": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUPPORTED = ".parquet, .arrow, .jsonl, .json or .txt files (.jsonl, .json and .txt also as .gz or .zst)"
TABLES = ("parquet", "arrow")
"""Kinds with columns, which are never compressed as a whole."""
DOCUMENT_CHARACTERS = 16 * 1024

# UTF-32's mark begins as UTF-16's does. All three codecs drop the mark.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
# What a file of another kind begins with: its name is wrong, or it was compressed twice.
_NOT_TEXT = {
    b"\x1f\x8b": "a gzip file, which is read where its name ends in .gz",
    b"\x28\xb5\x2f\xfd": "a zstandard file, which is read where its name ends in .zst",
    b"PAR1": "a parquet file, which is read where its name ends in .parquet",
    b"BZh9": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"PK\x03\x04": "a zip file",
}
# An error handler of ours: the one called "replace" leaves nothing that could be counted.
_MARKED = "leanstate.undecoded"
codecs.register_error(_MARKED, lambda error: (UNDECODED, error.end))  # type: ignore[attr-defined]

# A JSON string, to its end or that of the text, or what opens or closes a level. (`*+` never goes back: linear time.)
_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
# Python's parser recurses, and how deep it may depends on who called it.
_DEEPEST = 100
# The objects of a list are made all at once.
_LONGEST_LIST = 1 << 28


def kind_of(file: Path) -> str | None:
    """``parquet``, ``arrow``, ``json`` or ``text``, by the file's name in any case; None for any other."""
    compressed = file.suffix.lower() in COMPRESSIONS
    kind = KINDS.get((Path(file.stem).suffix if compressed else file.suffix).lower())
    return None if compressed and kind in TABLES else kind


def read_file(file: Path, text_column: str = "text") -> Iterator[Document]:
    """The documents of `file`, in order.

    Raises:
        UserError: the file cannot be opened, or the device not be read.
    """
    readers = {"parquet": _parquet, "arrow": _arrow, "json": _json, "text": _text}
    damages = _damages()
    last = "its beginning"
    try:
        for found in readers[kind_of(file) or "text"](file, text_column):
            last = found.where
            yield found
    except damages as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"data file {str(file)!r} cannot be read: {first_line(error)}.") from error
        problem = (
            f"data file {str(file)!r} is corrupt after {last}: {first_line(error)}; the rest of it cannot be read."
        )
        yield Document("", f"the rest of {str(file)!r}", problem)


def _damages() -> tuple[type[Exception], ...]:
    # Named before a file is read: at interpreter exit modules are already empty.
    import pyarrow as pa

    return (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowSerializationError, OSError)


# ---- tables -------------------------------------------------------------------------------------------------------


def check_table(file: Path, text_column: str) -> None:
    """Read the columns of a parquet or Arrow file.

    Raises:
        UserError: it is damaged, or there is no such column of text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind_of(file) == "arrow":
            with _record_batches(file) as (schema, _):
                pass
        else:
            schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data file {str(file)!r} cannot be read or is corrupt: {first_line(error)}.") from error
    if text_column not in schema.names:
        raise UserError(no_column(f"data file {str(file)!r}", text_column, schema.names))
    if schema.names.count(text_column) > 1:
        raise UserError(f"data file {str(file)!r} has more than one column {text_column!r}.")
    column = schema.field(text_column).type
    if not _is_text(column):
        raise UserError(f"column {text_column!r} of {str(file)!r} holds {column}, not text.")


def _is_text(column: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(column):
        column = column.value_type
    return pa.types.is_string(column) or pa.types.is_large_string(column) or pa.types.is_string_view(column)


def _parquet(file: Path, text_column: str) -> Iterator[Document]:
    """Row group by row group, because one that is damaged leaves the others whole."""
    import pyarrow.parquet as pq

    damages = _damages()
    with pq.ParquetFile(file) as parquet:
        end = 0
        for group in range(parquet.num_row_groups):
            row, end = end, end + parquet.metadata.row_group(group).num_rows
            try:
                for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=[text_column]):
                    for text in _texts(batch.column(0)):
                        row += 1
                        yield document(text or "", f"row {row} of {str(file)!r}")
            except damages as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                where = f"rows {row + 1} to {end} of {str(file)!r}"
                yield Document("", where, f"{where} are corrupt: {first_line(error)}.")


def _arrow(file: Path, text_column: str) -> Iterator[Document]:
    """Batch by batch, as `datasets.save_to_disk` writes a stream of them."""
    row = 0
    with _record_batches(file) as (_, batches):
        for batch in batches:
            for text in _texts(batch.column(text_column)):
                row += 1
                yield document(text or "", f"row {row} of {str(file)!r}")


@contextmanager
def _record_batches(file: Path) -> Iterator[tuple[pa.Schema, Iterable[pa.RecordBatch]]]:
    """Of Arrow's stream format, or its file format, which begins with a name."""
    import pyarrow as pa

    with pa.OSFile(str(file)) as source:
        named = source.read(6) == b"ARROW1"
        source.seek(0)
        if named:
            table = pa.ipc.open_file(source)
            yield table.schema, map(table.get_batch, range(table.num_record_batches))
        else:
            stream = pa.ipc.open_stream(source)
            yield stream.schema, stream


def _texts(column: pa.Array) -> list[str | None]:
    import pyarrow as pa

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if text is None else text.decode("utf-8", _MARKED) for text in raw]


# ---- JSON ---------------------------------------------------------------------------------------------------------


def _json(file: Path, text_column: str) -> Iterator[Document]:
    """The texts of a file with one JSON object a line, or of one JSON list of objects.

    Parsed line by line rather than into a table: a broken record is then named by its line, and columns
    that are not wanted may change type from row to row, as they do in real crawls.
    """
    empty = True
    with _open(file) as handle:
        for number, line in enumerate(_lines(handle), start=1):
            where = f"line {number} of {str(file)!r}"
            if line is None:
                problem = f"{where} has more than {documents.LONGEST:,} characters, the most that a line may have."
                yield Document("", where, problem)
            elif empty and line.lstrip().startswith("["):
                yield from _json_list(line, number, handle, file, text_column)
                return
            elif line := line.strip():
                empty = False
                found = _parsed(line, number, file)
                yield found if isinstance(found, Document) else _record(found, text_column, where)


def _json_list(line: str, number: int, handle: IO[str], file: Path, text_column: str) -> Iterator[Document]:
    rest = handle.read(_LONGEST_LIST)
    if len(rest) == _LONGEST_LIST:
        problem = (
            f"{str(file)!r} is one list of more than {_LONGEST_LIST:,} characters: write one object a line instead."
        )
        yield Document("", str(file), problem)
        return
    rows = _parsed(line + rest, number, file)
    if isinstance(rows, Document):
        yield rows
        return
    for index, row in enumerate(rows, start=1):
        yield _record(row, text_column, f"record {index} of {str(file)!r}")


def _lines(handle: IO[str]) -> Iterator[str | None]:
    """Line by line; None for one that is too long."""
    while line := handle.readline(documents.LONGEST + 1):
        too_long = len(line) > documents.LONGEST
        while too_long and line and not line.endswith("\n"):
            line = handle.readline(1 << 20)
        yield None if too_long else line


def _parsed(text: str, number: int, file: Path) -> Any:
    """What `text`, which begins at line `number`, is in JSON; a `Document` with a problem where it is none."""
    try:
        # No integer is too long for a float; Python refuses to make an int of more than 4,300 digits.
        return json.loads(_shallow(text), parse_int=float)
    except json.JSONDecodeError as error:
        where = f"line {number + error.lineno - 1} of {str(file)!r}"
        wanted = "wanted is one object a line, or one list of objects."
        return Document("", where, f"{where} is not valid JSON ({error.msg}): {wanted}")


def _shallow(text: str) -> str:
    """`text` with null in place of what is nested too deep to be a document or beside one."""
    if text.count("[") + text.count("{") <= _DEEPEST:
        return text
    depth = start = 0
    kept = []
    for found in _STRUCTURE.finditer(text):
        mark = found[0]
        if mark in ("[", "{"):
            if depth == _DEEPEST:
                kept.append(text[start : found.start()])
            depth += 1
        elif mark in ("]", "}"):
            depth -= 1
            if depth == _DEEPEST:
                kept.append("null")
                start = found.end()
    return "".join(kept) + ("" if depth > _DEEPEST else text[start:])


def _record(row: Any, text_column: str, where: str) -> Document:
    if not isinstance(row, dict):
        problem = f"{where}: wanted is an object with the key {text_column!r}, found {json_kind(row)}."
        return Document("", where, problem)
    if text_column not in row:
        return Document("", where, no_column(where, text_column, list(row)))
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        return Document("", where, f"{where}: {text_column!r} holds {json_kind(text)}, not text.")
    return document(text or "", where)


# ---- plain text ---------------------------------------------------------------------------------------------------


def _text(file: Path, text_column: str) -> Iterator[Document]:
    """The documents that a plain text file is cut into, see `cut`."""
    line = 1
    with _open(file) as handle:
        for piece in cut(handle):
            yield document(piece, f"line {line} of {str(file)!r}")
            line += piece.count("\n")


def cut(handle: IO[str], size: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Cut a text into documents of about `size` characters; joined, they give the text back.

    A whole book or dump in one file would otherwise be a single document, which no shuffle can mix and no
    held-out slice can divide. A cut falls after the last blank line in the second half of the document, else
    after the last line end in it, else at exactly `size` characters.
    """
    buffer = ""
    while chunk := handle.read(size):
        buffer += chunk
        while len(buffer) > size:
            for separator in ("\n\n", "\n"):
                start = buffer.rfind(separator, size // 2, size)
                if start >= 0:
                    end = start + len(separator)
                    break
            else:
                end = size
            yield buffer[:end]
            buffer = buffer[end:]
    if buffer:
        yield buffer


@contextmanager
def _open(file: Path) -> Iterator[IO[str]]:
    """A text file, compressed or not, in the encoding that its byte-order mark says, else UTF-8.

    `UNDECODED` stands for each run of bytes that is no character. (`pyarrow` notices a file that has been cut short,
    whatever its compression.)
    """
    import pyarrow as pa

    with file.open("rb") as raw:
        stream: Any = raw
        if compression := COMPRESSIONS.get(file.suffix.lower()):
            stream = io.BufferedReader(pa.CompressedInputStream(raw, compression))
        head = stream.peek(4)
        for magic, what in _NOT_TEXT.items():
            if head.startswith(magic):
                raise OSError(f"it is no text, but {what}")
        encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
        yield io.TextIOWrapper(stream, encoding=encoding, errors=_MARKED)


# ---- words --------------------------------------------------------------------------------------------------------


def no_column(where: str, column: str, columns: list[str]) -> str:
    """The sentence for a column that is not among `columns`."""
    return f"{where} has no column {column!r}: it has {quoted(columns)}.{nearest(column, columns)}"


def quoted(words: Iterable[str]) -> str:
    shown = [repr(word) for word in words]
    return some(shown, 12)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
