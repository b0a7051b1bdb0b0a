"""What `toolkit checkpoint inspect` lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import call, stock

from toolkit.checkpoint import universal
from toolkit.checkpoint.source import Source


def test_files_of_a_folder_of_many_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "universal"
    universal.write(Source(stock(tmp_path / "stock")), folder)
    files = universal.open_checkpoint(folder).manifest.files
    many = {name: entry["bytes"] for name, entry in files.items() if name.startswith("zero/")}
    monkeypatch.setattr("toolkit.commands.checkpoint._LISTED", len(many))
    shown = call("checkpoint", "inspect", folder).output
    assert all(name in shown for name in files)
    monkeypatch.setattr("toolkit.commands.checkpoint._LISTED", len(many) - 1)
    shown = call("checkpoint", "inspect", folder).output
    assert f"{sum(many.values()):,}  zero/ ({len(many)} files)" in shown
    assert [name for name in files if name in shown] == [name for name in files if name not in many]
