"""Folders of data: as `datasets.save_to_disk` leaves them, and with a file that is there twice."""

from __future__ import annotations

import gzip
import logging
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from toolkit.data import open_documents
from toolkit.errors import UserError

TEXTS = [f"document {number}" for number in range(10)]


def saved(folder: Path, **columns: list[object]) -> Path:
    made = datasets.Dataset.from_dict({"text": TEXTS, **columns})
    made.save_to_disk(str(folder), num_shards=3)
    return folder


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "corpus", number=list(range(10)))
    assert len(list(folder.glob("*.arrow"))) == 3 and list(folder.glob("*.json"))
    assert list(open_documents(str(folder))) == TEXTS
    datasets.load_from_disk(str(folder)).map(lambda row: row)
    assert list(folder.glob("cache-*.arrow"))
    assert list(open_documents(str(folder))) == list(open_documents(f"{folder}/*")) == TEXTS
    assert list(open_documents(f"{tmp_path}/**/**/*.arrow")) == TEXTS, "a glob that finds files in several ways"
    with pytest.raises(UserError, match=r"has no column 'txt': it has 'text', 'number'\. Did you mean 'text'\?"):
        open_documents(str(folder), text_column="txt")
    with pytest.raises(UserError, match="column 'number' of .* holds int64, not text"):
        open_documents(str(folder), text_column="number")


def test_a_shard_that_is_cut_short_gives_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "x.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})) as writer:
        for _ in range(2):
            writer.write_batch(pa.record_batch({"text": TEXTS}))
    file.write_bytes(file.read_bytes()[:-200])
    found = list(open_documents(str(file)).documents())
    assert [one.text for one in found[:-1]] == TEXTS
    assert "is corrupt after row 10 of" in found[-1].problem
    file.write_bytes(b"no arrow file")
    with pytest.raises(UserError, match="cannot be read or is corrupt"):
        open_documents(str(file))


def test_arrows_file_format_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, pa.schema({"text": pa.string()})) as writer:
        for _ in range(2):
            writer.write_batch(pa.record_batch({"text": TEXTS}))
    assert list(open_documents(str(file))) == 2 * TEXTS


def test_of_several_splits_one_is_named(tmp_path: Path) -> None:
    folder = str(tmp_path / "corpus")
    one = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(folder)
    with pytest.raises(UserError, match="holds the splits 'test', 'train' of a data set: choose one of its folders"):
        open_documents(folder)
    with pytest.raises(UserError, match="holds the splits 'test', 'train'"):
        open_documents(f"{folder}/**/*.arrow")
    assert list(open_documents(f"{folder}/train")) == TEXTS


@pytest.mark.parametrize("copy", ["packed", "link", "hard link"])
def test_no_text_is_read_twice(tmp_path: Path, copy: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    other = tmp_path / ("a.txt.gz" if copy == "packed" else "b.txt")
    if copy == "packed":
        other.write_bytes(gzip.compress(b"text"))
    else:
        (os.symlink if copy == "link" else os.link)(file, other)
    with pytest.raises(UserError, match=rf"holds .*a\.txt' and .*{other.name}', the same text twice"):
        open_documents(str(tmp_path))
    assert list(open_documents(str(other))) == ["text"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("x_train.txt", "x_val.txt"), "x_val.txt is read together with the training data"),
        (("train/a.txt", "test/a.txt", "validation/a.txt"), "validation/a.txt are read together with the training"),
        (("train-0.txt", "train-1.txt"), ""),
        (("contest.txt", "trainer.txt", "values.txt"), ""),
        (("val.txt", "test.txt"), ""),
        (("eval/train.txt", "eval/other.txt"), ""),
    ],
)
def test_held_out_files_beside_those_for_training_are_named(
    names: tuple[str, ...], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(f"document {number}")
    with caplog.at_level(logging.WARNING, "toolkit"):
        assert len(list(open_documents(str(tmp_path / "in")))) == len(names)
    assert (told in caplog.text) if told else not caplog.text
