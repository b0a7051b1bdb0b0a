"""What a record of `toolkit bench` keeps, so that the same is measured again; and the rounds of its `save`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import typer
from bench_command import process_kept, run

from toolkit.bench import save
from toolkit.bench.record import Record
from toolkit.commands.bench import app
from toolkit.commands.bench_call import OPTIONS

NOT_KEPT = {"json_to", "against", "anyway", "tolerance", "plugins", "plot", "help"}
"""Options that change nothing of what is measured; of plug-ins a file must not say which are run."""


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    with process_kept():
        yield


def test_a_record_keeps_every_option_that_changes_what_is_measured() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == set(OPTIONS)
    for name, command in commands.items():
        assert {option.name for option in command.params} - NOT_KEPT == set(OPTIONS[name]), name


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Stands for the processes that save: the method of each, and the folder in which it saves."""
    found: list[tuple[str, Path]] = []

    def finish(command: Sequence[str], threads: int, log: Path, name: str) -> None:
        asked = json.loads(Path(command[-1]).read_text())
        found.append((name, Path(asked["out"])))
        second = float(len(found))
        times = {"pause_seconds": second / 4, "save_seconds": second, "load_seconds": 2 * second}
        (Path(asked["out"]) / "found.json").write_text(json.dumps(times | {"bytes": 1000, "parameters": 100}))

    monkeypatch.setattr(save, "finish", finish)
    return found


def test_methods_save_in_turn_and_on_the_same_disk_again(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    made: list[tuple[str, Path]],
) -> None:
    disk, other, file = tmp_path / "disk", tmp_path / "other", tmp_path / "save.json"
    disk.mkdir(), other.mkdir()
    monkeypatch.chdir(tmp_path)
    given = ["save", "--methods", "amcs,deepspeed", "--threads", "1"]
    assert run(monkeypatch, *given, "--folder", "disk", "--json", str(file)) == 0
    assert [name for name, _ in made] == ["amcs", "deepspeed"] * 7
    own, deepspeed = Record.model_validate_json(file.read_text()).rows
    assert (own.timed["save_seconds"].median, deepspeed.timed["save_seconds"].median) == (7, 8)
    assert own.timed["load_seconds"].samples == 7 and own.counted["bytes_per_parameter"] == 10
    assert not list(disk.iterdir()), "checkpoints take gigabytes"

    made.clear()
    monkeypatch.chdir(other)
    assert run(monkeypatch, "--against", str(file), "--tolerance", "9") == 0
    assert len(made) == 14 and all(disk in place.parents for _, place in made)
    capsys.readouterr()
    for more in (["--folder", "."], []):
        assert run(monkeypatch, *given, *more, "--against", str(file)) == 2
        assert " was measured with folder " in capsys.readouterr().err
    assert len(made) == 14, "it is said before anything is measured"
