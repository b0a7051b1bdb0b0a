"""Local files to documents: parquet, Arrow, JSON and plain text, compressed or not.

Only a file that cannot be opened, or a device that cannot be read, ends a pass. What is no document is handed out as
one with a problem, and so is the rest of a damaged file. Memory is bounded by `LONGEST`, whatever a file grows to.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from toolkit.data import documents
from toolkit.data.columns import Column, Text, no_column
from toolkit.data.documents import UNDECODED, Document, document
from toolkit.errors import UserError
from toolkit.sentences import json_kind

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

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


def read_file(file: Path, column: Column = Text()) -> Iterator[Document]:
    """The documents of `file`, in order.

    Raises:
        UserError: the file cannot be opened, or the device not be read.
    """
    readers = {"parquet": _parquet, "arrow": _arrow, "json": _json, "text": _text}
    damages = _damages()
    last = "its beginning"
    try:
        for found in readers[kind_of(file) or "text"](file, column):
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


def fields_of(file: Path, tried: int) -> dict[str, bool]:
    """The columns of `file`, each with whether it holds lists of objects; of JSON the keys of the first object, of the
    first `tried` records. Empty where there are none, or the file is damaged."""
    if kind_of(file) in TABLES:
        try:
            schema = _schema(file)
        except UserError:
            return {}
        import pyarrow as pa

        return {field.name: _is_list(field.type) and pa.types.is_struct(field.type.value_type) for field in schema}
    if kind_of(file) != "json":
        return {}
    try:
        rows = islice(_rows(file, lambda row, where: row), tried)
        first = next((row for row in rows if isinstance(row, dict)), {})
    except _damages():
        return {}
    return {name: isinstance(value, list) and isinstance((value or [0])[0], dict) for name, value in first.items()}


def check_table(file: Path, column: Column) -> None:
    """Look at the columns of a parquet or Arrow file.

    Raises:
        UserError: it is damaged, or a column is not there or not what it is taken for.
    """
    schema = _schema(file)
    for name in column.names:
        if name not in schema.names:
            raise UserError(no_column(f"data file {str(file)!r}", name, schema.names))
        if schema.names.count(name) > 1:
            raise UserError(f"data file {str(file)!r} has more than one column {name!r}.")
        kind = schema.field(name).type
        if isinstance(column, Text) and not _is_text(kind):
            raise UserError(f"column {name!r} of {str(file)!r} holds {kind}, not text.")


def _schema(file: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind_of(file) == "arrow":
            with _record_batches(file) as (schema, _):
                return schema
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data file {str(file)!r} cannot be read or is corrupt: {first_line(error)}.") from error


def _is_text(column: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(column):
        column = column.value_type
    return pa.types.is_string(column) or pa.types.is_large_string(column) or pa.types.is_string_view(column)


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _parquet(file: Path, column: Column) -> Iterator[Document]:
    """Row group by row group, because one that is damaged leaves the others whole."""
    import pyarrow.parquet as pq

    damages = _damages()
    with pq.ParquetFile(file) as parquet:
        end = 0
        for group in range(parquet.num_row_groups):
            row, end = end, end + parquet.metadata.row_group(group).num_rows
            try:
                for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=list(column.names)):
                    for values in _values(batch, column):
                        row += 1
                        yield column.document(values, f"row {row} of {str(file)!r}")
            except damages as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                where = f"rows {row + 1} to {end} of {str(file)!r}"
                yield Document("", where, f"{where} are corrupt: {first_line(error)}.")


def _arrow(file: Path, column: Column) -> Iterator[Document]:
    """Batch by batch, as `datasets.save_to_disk` writes a stream of them."""
    row = 0
    with _record_batches(file) as (_, batches):
        for batch in batches:
            for values in _values(batch, column):
                row += 1
                yield column.document(values, f"row {row} of {str(file)!r}")


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


def _values(batch: pa.RecordBatch, column: Column) -> Iterator[dict[str, Any]]:
    columns = [_listed(batch.column(name)) for name in column.names]
    return (dict(zip(column.names, row, strict=True)) for row in zip(*columns, strict=True))


def _listed(column: pa.Array) -> list[Any]:
    import pyarrow as pa

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if _is_list(column.type):  # of messages: one that is no text in UTF-8 spoils its own conversation alone
            return (
                [UNDECODED] if len(column) == 1 else [_listed(column[row : row + 1])[0] for row in range(len(column))]
            )
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if text is None else text.decode("utf-8", _MARKED) for text in raw]


# ---- JSON ---------------------------------------------------------------------------------------------------------


def _json(file: Path, column: Column) -> Iterator[Document]:
    return _rows(file, lambda row, where: _record(row, column, where))


def _rows(file: Path, made: Callable[[Any, str], T]) -> Iterator[T | Document]:
    """What `made` makes of each object of a file with one JSON object a line, or of one JSON list of objects, and of
    where it stands.

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
                yield from _json_list(line, number, handle, file, made)
                return
            elif line := line.strip():
                empty = False
                found = _parsed(line, number, file)
                yield found if isinstance(found, Document) else made(found, where)


def _json_list(
    line: str, number: int, handle: IO[str], file: Path, made: Callable[[Any, str], T]
) -> Iterator[T | Document]:
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
        yield made(row, f"record {index} of {str(file)!r}")


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
        return json.loads(_shallow(text), parse_int=_whole)
    except json.JSONDecodeError as error:
        where = f"line {number + error.lineno - 1} of {str(file)!r}"
        wanted = "wanted is one object a line, or one list of objects."
        return Document("", where, f"{where} is not valid JSON ({error.msg}): {wanted}")


def _whole(digits: str) -> int | float:
    """No integer is too long for a float; Python refuses to make an int of more than 4,300 digits."""
    return int(digits) if len(digits) < 4300 else float(digits)


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


def _record(row: Any, column: Column, where: str) -> Document:
    if not isinstance(row, dict):
        problem = f"{where}: wanted is an object with the key {column.names[0]!r}, found {json_kind(row)}."
        return Document("", where, problem)
    for name in column.required:
        if name not in row:
            return Document("", where, no_column(where, name, list(row)))
    return column.document(row, where)


# ---- plain text ---------------------------------------------------------------------------------------------------


def _text(file: Path, column: Column) -> Iterator[Document]:
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


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
