"""Sources of documents: FineWeb from the hub, Python's own standard library, or local files.

Everything that can be wrong with a source is looked for when it is opened (parquet footers, the schema of
every file, the first record of every JSON file, an empty corpus), because by the time the first batch is
asked for a model has been built on every rank.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from toolkit.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

FINEWEB = "HuggingFaceFW/fineweb"
FINEWEB_SUBSET = "sample-10BT"
NAMES = ("fineweb", "stdlib")
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
COMPRESSIONS = (".gz", ".zst")
SUPPORTED = ".parquet, .jsonl, .json or .txt files (.jsonl, .json and .txt also as .gz or .zst)"
DOCUMENT_CHARACTERS = 16 * 1024
FINGERPRINTED = 256
"""Documents that tell one corpus from another."""


@dataclass(frozen=True)
class Documents:
    """A corpus that can be read any number of times, always in the same order.

    `name` is what the user called it, for messages; `read` starts one pass; `sizes` are those of its files, in
    order, where it has any. Iterating skips documents without text.
    """

    name: str
    read: Callable[[], Iterator[str]]
    sizes: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.read() if text and not text.isspace())

    def fingerprint(self) -> str:
        """SHA-256 of the first documents and of the files' sizes: the same corpus wherever it lies."""
        digest = hashlib.sha256(repr(self.sizes).encode())
        for text in islice(self, FINGERPRINTED):
            digest.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))
        return digest.hexdigest()


def open_documents(
    spec: str, *, subset: str | None = None, text_column: str = "text", split: str = "train"
) -> Documents:
    """Open the corpus called `spec` and check it.

    Args:
        spec: ``fineweb`` (streamed from the Hugging Face hub), ``stdlib`` (this interpreter's own standard
            library), or a file, folder or glob of parquet, JSON lines or plain text, all of one kind.
        subset: FineWeb's config name, ``sample-10BT`` if none is given; no other source has one.
        text_column: column (parquet) or key (JSON) that holds the text.
        split: split of the hub dataset; local files and ``stdlib`` have one split only.

    Raises:
        UserError: unknown name, no such file, mixed kinds, unreadable or corrupt file, no such column, hub
            out of reach, or no text at all.
    """
    if spec != "fineweb" and (subset is not None or split != "train"):
        raise UserError(f"data {spec!r} has no subsets or splits: they can be chosen for 'fineweb' only.")
    if spec == "fineweb":
        documents = Documents(spec, _fineweb(subset or FINEWEB_SUBSET, text_column, split))
    elif spec == "stdlib":
        documents = Documents(spec, _stdlib)
    else:
        files, kind = _find_files(spec)
        if kind == "parquet":
            _check_parquet(files, text_column)
        elif kind == "json":
            for file in files:
                next(_json(file, text_column), None)
        sizes = tuple(file.stat().st_size for file in files)
        documents = Documents(spec, lambda: _read_files(files, kind, text_column), sizes)
    if next(iter(documents), None) is None:
        raise UserError(f"data {spec!r} is an empty corpus: it holds no text.")
    return documents


def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers at all.

    Asked once before a download, because the hub's clients spend up to a minute on retries before they admit
    that there is no network.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # whichever of its many errors the HTTP client raises, the answer is no
        return False
    return True


def _fineweb(subset: str, text_column: str, split: str) -> Callable[[], Iterator[str]]:
    # `load_dataset` takes a folder of that name, a clone of the dataset, before it asks the hub.
    if not Path(FINEWEB).is_dir() and not hub_reachable():
        raise UserError(
            f"data 'fineweb' streams {FINEWEB} from the Hugging Face hub, which cannot be reached: give a "
            "path or glob to local parquet files of it instead."
        )
    import datasets

    try:
        known = datasets.get_dataset_config_names(FINEWEB)
        if subset not in known:
            raise UserError(f"{FINEWEB} has no subset {subset!r}: it has {_listed(known)}.{nearest(subset, known)}")
        stream = datasets.load_dataset(FINEWEB, name=subset, split=split, streaming=True)
        if text_column not in (columns := stream.column_names or [text_column]):
            raise _no_column(FINEWEB, text_column, columns)
    except UserError:
        raise
    except Exception as error:  # the hub's clients have no common base for their errors
        raise UserError(f"{FINEWEB} cannot be opened on the Hugging Face hub: {_first_line(error)}.") from error

    def read() -> Iterator[str]:
        try:
            for row in stream.select_columns([text_column]):
                yield row[text_column]
        except Exception as error:
            raise UserError(f"{FINEWEB} cannot be read from the Hugging Face hub: {_first_line(error)}.") from error

    return read


def stdlib_files() -> list[Path]:
    """Every .py file of the running interpreter's standard library, in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    foreign = {"site-packages", "dist-packages"}
    files = [file for file in root.rglob("*.py") if not foreign.intersection(file.relative_to(root).parts)]
    if not files:
        raise UserError(f"data 'stdlib' needs the standard library as .py files, and {root} holds none.")
    return sorted(files)


def _stdlib() -> Iterator[str]:
    for file in stdlib_files():
        yield from read_text(file)


def _find_files(spec: str) -> tuple[list[Path], str]:
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        found = [file for file in path.rglob("*") if _kind(file) and not file.name.startswith(".")]
        if not found:
            raise UserError(f"folder {spec!r} holds no data: wanted are {SUPPORTED}.")
    elif spec and path.exists():
        found = [path]
    elif glob.has_magic(spec):
        found = [file for name in glob.glob(str(path), recursive=True) if not (file := Path(name)).is_dir()]
        if not found:
            raise UserError(f"no file matches {spec!r}.{_nearest_file(path)}")
    elif path.suffix or len(path.parts) > 1:
        raise UserError(f"there is no data file or folder {spec!r}.{_nearest_file(path)}")
    else:
        hint = nearest(spec, NAMES) or _nearest_file(path)
        raise UserError(f"unknown data {spec!r}: give 'fineweb', 'stdlib', or a path or glob to {SUPPORTED}.{hint}")
    files = sorted(found)
    for file in files:
        if _kind(file) is None:
            raise UserError(f"data file {str(file)!r} is of no supported kind: wanted are {SUPPORTED}.")
    kinds = sorted({_kind(file) or "" for file in files})
    if len(kinds) != 1:
        raise UserError(f"data {spec!r} mixes {_listed(kinds)} files: choose one kind with a glob such as '*.parquet'.")
    return files, kinds[0]


def _kind(file: Path) -> str | None:
    compressed = file.suffix in COMPRESSIONS
    kind = KINDS.get(Path(file.stem).suffix if compressed else file.suffix)
    return None if compressed and kind == "parquet" else kind


def _nearest_file(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, siblings)


def _read_files(files: Iterable[Path], kind: str, text_column: str) -> Iterator[str]:
    for file in files:
        if kind == "parquet":
            yield from _parquet(file, text_column)
        elif kind == "json":
            yield from _json(file, text_column)
        else:
            yield from read_text(file)


def _check_parquet(files: Iterable[Path], text_column: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise _corrupt(file, error) from error
        if text_column not in schema.names:
            raise _no_column(f"data file {str(file)!r}", text_column, schema.names)
        column = schema.field(text_column).type
        if not _is_text(column):
            raise UserError(f"column {text_column!r} of {str(file)!r} holds {column}, not text.")


def _is_text(column: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(column):
        column = column.value_type
    return pa.types.is_string(column) or pa.types.is_large_string(column) or pa.types.is_string_view(column)


def _parquet(file: Path, text_column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    failures = (pa.ArrowException, OSError)  # named here: at interpreter exit `pa` is already empty
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=256, columns=[text_column]):
                yield from batch.column(0).to_pylist()
    except failures as error:
        raise _corrupt(file, error) from error


def _json(file: Path, text_column: str) -> Iterator[str]:
    """The texts of a file with one JSON object a line, or of one JSON list of objects.

    Parsed line by line rather than into a table: a broken record is then named by its line, and columns
    that are not wanted may change type from row to row, as they do in real crawls.
    """
    number = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1 and line.lstrip().startswith("["):
                    for index, row in enumerate(json.loads(line + lines.read()), start=1):
                        yield _text_of(row, text_column, f"record {index} of {str(file)!r}")
                elif line := line.strip():
                    yield _text_of(json.loads(line), text_column, f"line {number} of {str(file)!r}")
    except json.JSONDecodeError as error:
        raise UserError(
            f"line {number + error.lineno - 1} of {str(file)!r} is not valid JSON ({error.msg}): wanted is "
            "one object a line, or one list of objects."
        ) from error


def _text_of(row: Any, text_column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: wanted is an object with the key {text_column!r}, found {type(row).__name__}.")
    if text_column not in row:
        raise _no_column(where, text_column, list(row))
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {text_column!r} holds {type(text).__name__}, not text.")
    return text or ""


def read_text(file: Path) -> Iterator[str]:
    """The documents that a plain text file is cut into, see `cut`."""
    with _open(file) as handle:
        yield from cut(handle)


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
    """A text file, compressed or not; bytes that are not UTF-8 are replaced, lest one end a run of days."""
    import zstandard

    failures = (OSError, EOFError, zlib.error, zstandard.ZstdError)  # named here: see `_parquet`
    try:
        with file.open("rb") as raw:
            stream: Any = raw
            if file.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            elif file.suffix == ".zst":
                # Parallel compressors write many frames; older zstandard reads only the first by default.
                stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace")
    except failures as error:
        raise _corrupt(file, error) from error


def _corrupt(file: Path, error: Exception) -> UserError:
    return UserError(f"data file {str(file)!r} cannot be read or is corrupt: {_first_line(error)}.")


def _no_column(where: str, column: str, columns: list[str]) -> UserError:
    return UserError(f"{where} has no column {column!r}: it has {_listed(columns)}.{nearest(column, columns)}")


def _listed(words: Iterable[str]) -> str:
    shown = [repr(word) for word in words]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
