"""The run folder: what it keeps, whose it is, and the plot."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.console import PlainConsole
from toolkit.errors import UserError
from toolkit.records.run import read_metrics, strict
from toolkit.run import start as starts
from toolkit.run.folder import RunFolder, check_free, default_folder, plot_loss
from toolkit.run.screen import Screen
from toolkit.run.settings import RunSettings
from toolkit.run.summary import written_again

JSON: dict[str, Any] = {"optimizer": {"type": "AMCS"}}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_disk_that_is_full_at_the_end_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run", {}, JSON)
    folder.write_step({"step": 1, "loss": 2.5, "skipped": False})
    (tmp_path / "run" / "loss.png").symlink_to("/dev/full")
    problem = folder.write_end({"loss": 2.5}, [{"step": 1, "loss": 2.5}])
    assert problem == (
        f"the run has ended, and its summary and loss curve cannot all be written to {tmp_path / 'run'}: No space left "
        "on device; metrics.jsonl has every step."
    )
    assert not (tmp_path / "run" / "loss.png").is_symlink()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"loss": 2.5}
    monkeypatch.setattr("toolkit.run.folder.replace_text", lambda path, text: Path("/dev/full").write_text(text))
    assert folder.write_end({"loss": 1.5}, [{"step": 1, "loss": 2.5}]) == problem
    assert not (tmp_path / "run" / "summary.json").exists(), "an earlier one would be taken for that of this run"
    folder.close()


def test_a_summary_is_written_again_only_where_it_is_missing_or_of_an_earlier_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {}, JSON, checkpoints=True)
    line = {"loss": 1.0, "tokens_per_s": 1.0, "step_time_s": 1.0, "skipped": False}
    for step in (1, 2):
        folder.write_step({"step": step, **line})
    records, dropped = folder.records(2)
    assert (len(records), dropped) == (2, 0)
    said: list[str] = []
    checkpoint = tmp_path / "run" / "checkpoints" / "global_step2"
    source: Any = SimpleNamespace(folder=checkpoint, manifest=SimpleNamespace(facts={}))

    prepared: Any = SimpleNamespace(
        folder=tmp_path / "run", parameters=8, settings=SimpleNamespace(steps=2, max_skipped=20, memory_profile="off")
    )
    console = PlainConsole(file=io.StringIO(), width=80)
    screen: Any = SimpleNamespace(say=said.append, summary=lambda summary: None)

    def again() -> dict[str, Any] | None:
        return written_again(prepared, folder, starts.Start(2, source), screen)

    assert folder.write_end({"steps": 2, "interrupted": False}, records) is None
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert again() == {"steps": 2, "interrupted": False} and not said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "run" / "loss.png").unlink()
    assert again() == {"steps": 2, "interrupted": False} and (tmp_path / "run" / "loss.png").exists()
    assert said == ["note: loss.png was missing, and is drawn now."]
    for earlier in ({"steps": 1, "interrupted": False}, {"steps": 2, "interrupted": True}, None):
        if earlier is None:
            (tmp_path / "run" / "summary.json").unlink()
        else:
            assert folder.write_end(earlier, records) is None
        written = again()
        assert written == folder.summary() and written is not None
        assert (written["steps"], written["loss"], written["interrupted"]) == (2, 1.0, False)
        assert "peak_memory_bytes" not in written, "the checkpoint, of an older version, does not note it"
        assert "what else was measured: summary.json is made of metrics.jsonl alone" in said[-1]
        Screen(2, shown=True, console=console).summary(written)
    assert "peak memory" in console.file.getvalue() and len(said) == 4  # type: ignore[attr-defined]
    source.folder = tmp_path / "other" / "checkpoints" / "global_step2"
    assert again() is None and len(said) == 4, "of another run"
    folder.close()


def test_run_folder_keeps_strict_json_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 1}, JSON)
    records = [
        strict({"step": 1, "loss": 2.5, "grad_norm": None, "skipped": False}),
        strict({"step": 2, "loss": math.nan, "grad_norm": math.inf, "skipped": True}),
    ]
    for record in records:
        folder.write_step(record)
    # Read before closing: every line is on disk as soon as it is written.
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == records
    assert records[1] == {
        "step": 2,
        "loss": None,
        "grad_norm": None,
        "skipped": True,
        "nonfinite": ["loss", "grad_norm"],
    }
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_step({"loss": math.nan})
    assert folder.write_end({"loss": 2.5}, records) is None
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    folder.close()
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text()) == JSON
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"seed": 1}
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"loss": 2.5}


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("held", ["metrics.jsonl", "run.json"])
def test_a_folder_with_a_run_is_refused_and_kept(tmp_path: Path, held: str) -> None:
    (tmp_path / held).write_text("precious")
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder(tmp_path, {}, {})
    assert (tmp_path / held).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [held]


def test_a_run_that_keeps_checkpoints_is_continued(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 1}, {"old": 1}, checkpoints=True)
    line = {"loss": 1.0, "tokens_per_s": 1.0, "step_time_s": 1.0, "skipped": False}
    for step in range(1, 6):
        folder.write_step({"step": step, **line})
    with pytest.raises(UserError, match="is in use by another run"):
        RunFolder(tmp_path / "run", {}, {}, resuming=True)
    folder.close()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    again = RunFolder(tmp_path / "run", {"seed": 2}, {"new": 1}, resuming=True)
    assert again.continue_after(3, {"new": 1}) == [{"step": step, **line} for step in (1, 2, 3)]
    again.write_step({"step": 4})
    again.close()
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"seed": 1}
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text()) == {"new": 1}


def test_a_run_without_checkpoints_is_never_continued(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {}, {})
    folder.write_step({"step": 1})
    folder.close()
    with pytest.raises(UserError, match=r"keeps no checkpoints .* --run-dir \(\S*toolkit report .* shows this one\)\."):
        RunFolder(tmp_path, {}, {}, resuming=True)
    # Somebody has removed the checkpoints of a longer run than one interval.
    (tmp_path / "checkpoints").mkdir()
    check_free(tmp_path, resuming=True)
    assert starts._from_the_start(RunSettings(save_every=1), tmp_path).step == 0
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n')
    assert starts._from_the_start(RunSettings(save_every=2), tmp_path).step == 0
    with pytest.raises(UserError, match="has made 2 steps and has no checkpoint"):
        starts._from_the_start(RunSettings(save_every=1), tmp_path)


def test_folders_that_cannot_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_free(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run", {}, {})


def test_a_run_without_a_step_gives_its_folder_back(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    RunFolder(tmp_path, {}, {}).close()
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    RunFolder(tmp_path / "new", {}, {}).close()
    assert not (tmp_path / "new").exists()


def test_default_folders_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = default_folder("models/my model", "configs/my.json")
    assert first.parent == Path("runs") and first.name.startswith("my-model-my-20")
    first.mkdir(parents=True)
    second = default_folder("models/my model", "configs/my.json")
    assert second != first


def test_plot_is_a_png_that_shows_the_losses(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"step": step, "loss": 8.0 / step} for step in range(1, 20)]
    plot_loss(records, tmp_path / "plain.png", title="run")
    records[5]["loss"] = None
    records[9]["val_loss"] = 3.0
    plot_loss(records, tmp_path / "both.png", title="run")
    plain, both = ((tmp_path / name).read_bytes() for name in ("plain.png", "both.png"))
    assert plain.startswith(b"\x89PNG\r\n") and both.startswith(b"\x89PNG\r\n")
    assert plain != both
