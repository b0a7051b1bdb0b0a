"""When a run is started again, and with which options; `tests/distributed/test_faults.py` kills a real one's rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.run.restarting import FINAL, Restarts
from toolkit.run.settings import parse


class Script:
    """Runs that end as is written: (status, newest checkpoint afterwards, whether somebody asked)."""

    def __init__(self, folder: Path, *ends: tuple[int, int, bool]) -> None:
        self.folder, self.ends, self.lines = folder, list(ends), list[list[str]]()

    def __call__(self, line: list[str]) -> tuple[int, bool]:
        self.lines.append(line)
        status, step, asked = self.ends.pop(0)
        if step:
            (self.folder / "checkpoints" / f"global_step{step}").mkdir(parents=True, exist_ok=True)
        return status, asked


def run(folder: Path, at_most: int, *ends: tuple[int, int, bool], more: str = "") -> tuple[int, list[list[str]]]:
    settings = parse(f"--run-dir {folder} --steps 9 {more}".split())
    assert settings is not None
    script = Script(folder, *ends)
    status = Restarts(settings, at_most).until_the_end(script)
    assert not script.ends
    return status, script.lines


def test_it_starts_again_where_it_was_until_it_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(tmp_path, 3, (247, 0, False), (110, 4, False), (1, 8, False), (0, 9, False))
    assert status == 0 and lines == [["--steps=9", f"--run-dir={tmp_path}"]] * 4
    wheres = ("247 and starts again from the beginning", "110 and starts again from its checkpoint of step 4")
    assert capsys.readouterr().err.splitlines() == [
        f"note: the run has ended with status {where} (restart {made} of at most 3)."
        for made, where in enumerate((*wheres, "1 and starts again from its checkpoint of step 8"), 1)
    ]


@pytest.mark.parametrize("status", FINAL)
def test_what_would_end_so_again_is_left_alone(tmp_path: Path, status: int) -> None:
    assert run(tmp_path, 5, (status, 4, False))[0] == status


def test_it_stops_at_the_limit_when_asked_and_in_vain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none", 0, (1, 4, False))[0] == 1
    assert run(tmp_path / "asked", 5, (1, 4, True))[0] == 1
    assert capsys.readouterr().err == ""
    assert run(tmp_path / "limit", 1, (1, 4, False), (1, 8, False))[0] == 1
    assert "is not started again: --restarts allows 1." in capsys.readouterr().err
    # Without progress, with it, and twice without.
    assert run(tmp_path / "vain", 9, *((1, step, False) for step in (0, 4, 4, 4)))[0] == 1
    assert "is not started again: 2 times in a row it has saved no checkpoint." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resume", "saved", "kept"),
    [("none", 0, False), ("none", 4, False), ("other/run", 0, True), ("other/run", 4, False)],
)
def test_what_it_has_saved_itself_goes_before_what_it_was_told_to_resume(
    tmp_path: Path, resume: str, saved: int, kept: bool
) -> None:
    _, [first, second] = run(tmp_path, 1, (1, saved, False), (0, 9, False), more=f"--resume {resume}")
    assert f"--resume={resume}" in first and (f"--resume={resume}" in second) == kept


def test_it_needs_a_folder() -> None:
    settings = parse(["--steps", "3"])
    assert settings is not None
    with pytest.raises(UserError, match="--restarts continues what is in the run's folder; name it with --run-dir."):
        Restarts(settings, 1)
    Restarts(settings, 0)


def test_it_needs_checkpoints(tmp_path: Path) -> None:
    settings = parse(["--steps", "3", "--run-dir", str(tmp_path), "--save-every", "0"])
    assert settings is not None
    with pytest.raises(UserError, match="--restarts continues from checkpoints, and --save-every is 0"):
        Restarts(settings, 1)
