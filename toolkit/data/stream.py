"""Sources of documents: FineWeb from the hub, Python's own standard library, or local files.

What is wrong with a source as a whole is looked for when it is opened (parquet footers, the schema of every file, the
first records of every JSON or text file, an empty corpus), because by the time the first batch is asked for a model has
been built on every rank. Single documents that cannot be used are skipped later, and counted.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from toolkit.data.columns import LISTS, Column, Text, choose, no_column, quoted
from toolkit.data.documents import BadDocuments, Document, Documents, document
from toolkit.data.files import COMPRESSIONS, SUPPORTED, TABLES, check_table, fields_of, first_line, kind_of, read_file
from toolkit.errors import UserError, nearest, some
from toolkit.printable import warn_once

logger = logging.getLogger("toolkit")

FINEWEB = "HuggingFaceFW/fineweb"
FINEWEB_SUBSET = "sample-10BT"
NAMES = ("fineweb", "stdlib")
TRIED = 100
"""A source whose first so many documents all cannot be used is refused."""


def open_documents(
    spec: str,
    *,
    subset: str | None = None,
    text_column: str = "text",
    split: str = "train",
    bad: BadDocuments = "skip",
) -> Documents:
    """Open the corpus called `spec` and check it.

    Args:
        spec: ``fineweb`` (streamed from the Hugging Face hub), ``stdlib`` (this interpreter's own standard
            library), or a file, folder or glob of parquet, Arrow, JSON lines or plain text, all of one kind.
        subset: FineWeb's config name, ``sample-10BT`` if none is given; no other source has one.
        text_column: column (parquet) or key (JSON) that holds the text, or conversations; where there is no "text",
            conversations under their usual names are found (`columns.choose`).
        split: split of the hub dataset; local files and ``stdlib`` have one split only.
        bad: whether documents that cannot be used are skipped, or stop whoever reads.

    Raises:
        UserError: unknown name, no such file, mixed kinds, a file that is there twice, one that is unreadable or
            begins with nothing but documents that cannot be used, no such column, hub out of reach, or no text at all.
    """
    if spec != "fineweb" and (subset is not None or split != "train"):
        raise UserError(f"data {spec!r} has no subsets or splits: they can be chosen for 'fineweb' only.")
    if spec == "fineweb":
        documents = Documents(spec, _fineweb(subset or FINEWEB_SUBSET, text_column, split), bad=bad)
    elif spec == "stdlib":
        files = stdlib_files()
        documents = Documents(spec, lambda: _read_files(files, Text()), bad=bad, state=_state(files, Text()))
    else:
        files, kind = _find_files(spec)
        fields = fields_of(files[0], TRIED)
        column = choose(text_column, fields)
        if isinstance(column, Text) and (lists := [name for name in LISTS if fields.get(name)]):
            warn_once(
                logger,
                "data %r: the column %r is taken, as text; --text-column %s takes the conversations beside it",
                *(spec, text_column, lists[0]),
            )
        for file in files:
            if kind in TABLES:
                check_table(file, column)
            else:
                _begins_well(read_file(file, column))
        sizes = tuple(file.stat().st_size for file in files)
        chats = not isinstance(column, Text)
        documents = Documents(
            spec, lambda: _read_files(files, column), sizes, bad, _state(files, column), conversations=chats
        )
    if not _begins_well(documents.documents()):
        raise UserError(f"data {spec!r} is an empty corpus: it holds no text.")
    return documents


def check_source(spec: str) -> None:
    """Raise UserError where there is nothing called `spec`, as `open_documents`. No file is opened."""
    if spec not in NAMES:
        _find_files(spec)


def _state(files: Iterable[Path], column: Column) -> tuple[object, ...]:
    """What changes with the texts of `files`: of each, where it is and when it was changed, by whatever means."""
    about = ((str(file.absolute()), file.stat()) for file in files)
    return (repr(column), *((name, found.st_size, found.st_mtime_ns, found.st_ctime_ns) for name, found in about))


def _read_files(files: Iterable[Path], column: Column) -> Iterator[Document]:
    for file in files:
        yield from read_file(file, column)


def _begins_well(documents: Iterable[Document]) -> bool:
    """Whether there is any text.

    Raises:
        UserError: none of the first documents can be used; says what is wrong with the first of them.
    """
    problems: list[str] = []
    for found in documents:
        if found.problem:
            problems.append(found.problem)
        elif found.text and not found.text.isspace():
            return True
        if len(problems) == TRIED:
            break
    if problems:
        raise UserError(problems[0])
    return False


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


def _fineweb(subset: str, text_column: str, split: str) -> Callable[[], Iterator[Document]]:
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
            raise UserError(f"{FINEWEB} has no subset {subset!r}: it has {quoted(known)}.{nearest(subset, known)}")
        stream = datasets.load_dataset(FINEWEB, name=subset, split=split, streaming=True)
        if text_column not in (columns := stream.column_names or [text_column]):
            raise UserError(no_column(FINEWEB, text_column, columns))
    except UserError:
        raise
    except Exception as error:  # the hub's clients have no common base for their errors
        raise UserError(f"{FINEWEB} cannot be opened on the Hugging Face hub: {first_line(error)}.") from error

    def read() -> Iterator[Document]:
        try:
            for number, row in enumerate(stream.select_columns([text_column]), start=1):
                yield document(row[text_column] or "", f"row {number} of {FINEWEB}")
        except Exception as error:
            raise UserError(f"{FINEWEB} cannot be read from the Hugging Face hub: {first_line(error)}.") from error

    return read


def stdlib_files() -> list[Path]:
    """Every .py file of the running interpreter's standard library, in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    foreign = {"site-packages", "dist-packages"}
    files: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = set(inner) - foreign  # not even looked into: they may hold a hundred thousand files
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"data 'stdlib' needs the standard library as .py files, and {root} holds none.")
    return sorted(files)


_RECORDS = ("state.json", "dataset_info.json")
"""What `datasets` writes about data beside it; `_SPLITS` above the folders of several splits."""
_SPLITS = "dataset_dict.json"


def _find_files(spec: str) -> tuple[list[Path], str]:
    path = Path(spec).expanduser()
    try:
        path.exists()
    except OSError as error:  # a name that is too long, links in a circle
        raise UserError(f"data {spec!r} cannot be opened: {error.strerror}.") from None
    if spec and path.is_dir():
        # What is hidden is a program's own: .ipynb_checkpoints/, .git/, macOS's ._x.jsonl.
        inside = (file for file in path.rglob("*") if kind_of(file) and file.is_file())
        found = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        found = _without_records(found, spec)
        if not found:
            raise UserError(f"folder {spec!r} holds no data: supported are {SUPPORTED}.")
    elif spec and path.exists():
        if not path.is_file():
            raise UserError(f"data {spec!r} is neither a file nor a folder, and could not be read twice.")
        found = [path]
    elif glob.has_magic(spec):
        found = [file for name in glob.glob(str(path), recursive=True) if (file := Path(name)).is_file()]
        found = _without_records(found, spec)
        if not found:
            raise UserError(f"no file matches {spec!r}.{_nearest_file(path)}")
    elif path.suffix or len(path.parts) > 1:
        raise UserError(f"there is no data file or folder {spec!r}.{_nearest_file(path)}")
    else:
        hint = nearest(spec, NAMES) or _nearest_file(path)
        raise UserError(f"unknown data {spec!r}: give 'fineweb', 'stdlib', or a path or glob to {SUPPORTED}.{hint}")
    files = sorted(set(found))  # a glob finds a file once for each way in which it matches
    for file in files:
        if kind_of(file) is None:
            raise UserError(f"data file {str(file)!r} is of no supported kind: supported are {SUPPORTED}.")
    kinds = sorted({kind_of(file) or "" for file in files})
    if len(kinds) != 1:
        raise UserError(f"data {spec!r} mixes {quoted(kinds)} files: choose one kind with a glob such as '*.parquet'.")
    _check_once(files, spec)
    _remark_splits(files, spec)
    return files, kinds[0]


def _without_records(files: list[Path], spec: str) -> list[Path]:
    """Without what `datasets` writes beside the data that `save_to_disk` saves: records, and results of its `map`."""
    folders = {file.parent for file in files}
    saved = {folder for folder in folders if all((folder / name).is_file() for name in _RECORDS)}
    dictionaries = {folder.parent for folder in saved if (folder.parent / _SPLITS).is_file()}
    for dictionary in sorted(dictionaries):
        splits = sorted(folder.name for folder in saved if folder.parent == dictionary)
        if len(splits) > 1:
            raise UserError(
                f"data {spec!r} holds the splits {quoted(splits)} of a data set: choose one of its folders."
            )

    def beside(file: Path) -> bool:
        made = file.name.startswith("cache-") and kind_of(file) == "arrow" and (file.parent / _RECORDS[1]).is_file()
        return made or (file.name in _RECORDS and file.parent in saved) or file.name == _SPLITS

    return [file for file in files if not beside(file)]


def _check_once(files: list[Path], spec: str) -> None:
    """Raises UserError where a text would be read twice: from a file and a link to it, or a compressed copy."""
    known: dict[object, Path] = {}
    for file in files:
        about = file.stat()
        unpacked = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
        unpacked = unpacked.with_suffix(unpacked.suffix.lower())
        for key in ((about.st_dev, about.st_ino), unpacked):
            other = known.setdefault(key, file)
            if other != file:
                raise UserError(
                    f"data {spec!r} holds {str(other)!r} and {str(file)!r}, the same text twice: remove one, or choose "
                    "with a glob."
                )


_SPLIT = re.compile(r"(?<![a-z])(train|training|val|valid|validation|dev|eval|test)(?![a-z])", re.IGNORECASE)


def _remark_splits(files: list[Path], spec: str) -> None:
    """Warn where files are read together that their names, or their folders', set apart: what trains is then no longer
    held out."""
    common = os.path.commonpath([file.parent for file in files])
    named = {file: {word.lower() for word in _SPLIT.findall(os.path.relpath(file, common))} for file in files}
    training = [file for file, words in named.items() if words & {"train", "training"}]
    others = [str(file) for file, words in named.items() if words and not words & {"train", "training"}]
    if training and others:
        warn_once(
            logger,
            "data %r: %s %s read together with the training data; give the files for training alone, and what is held "
            "out with --val-data",
            *(spec, some(others, 3), "is" if len(others) == 1 else "are"),
        )


def _nearest_file(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, siblings)
