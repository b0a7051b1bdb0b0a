"""How files are replaced: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from toolkit.paths import replace_text


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    for text in ("old", "new, with an é\n"):
        replace_text(path, text, durable=durable)
        assert path.read_bytes() == text.encode() and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_what_ends_the_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "file"
    replace_text(path, "old")

    def fails(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(type(failure)):
        replace_text(path, "new", durable=True)
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_links_are_replaced_and_never_written_through(tmp_path: Path) -> None:
    theirs, folder = tmp_path / "theirs", tmp_path / "folder"
    folder.mkdir()
    theirs.write_text("theirs")
    path = folder / "file"
    path.symlink_to(theirs)
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to(theirs)  # where the draft is written
    replace_text(path, "ours")
    assert theirs.read_text() == "theirs" and path.read_text() == "ours" and not path.is_symlink()
    assert [*folder.iterdir()] == [path]
