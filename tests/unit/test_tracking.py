"""`--track`: the curves of a run in TensorBoard and in Weights & Biases, also after a resume."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from toolkit.cli import main
from toolkit.errors import UserError
from toolkit.records.run import EVENTS
from toolkit.run.folder import RunFolder
from toolkit.run.monitors import Monitors, check_one, check_packages
from toolkit.run.restarting import Restarts
from toolkit.run.settings import parse
from toolkit.run.terms import Saved, kept_settings
from toolkit.run.tracking import Tracking, check, scalars

WANDB = '''
"""What a run uses of wandb, with its rules: a run that exists is continued, and takes no step twice."""
import json, os, pathlib

class UsageError(Exception): ...

class CommError(Exception): ...

class Run:
    offline = False

    def __init__(self, id, options):
        self._file = pathlib.Path(os.environ["WANDB_KEPT"]) / id
        known = self._file.read_text().splitlines() if self._file.exists() else []
        self.starting_step = json.loads(known[-1])[0] + 1 if known else 0
        self._next, self.url, self.dir = self.starting_step, "https://wandb.example/" + id, "."
        (self._file.parent / "options.json").write_text(json.dumps(options))

    def log(self, values, step):
        assert step >= self._next, "wandb drops a step that is not the next"
        self._next = step + 1
        with open(self._file, "a") as file:
            file.write(json.dumps([step, values]) + "\\n")

    def finish(self, exit_code=None):
        (self._file.parent / "ended.json").write_text(json.dumps(exit_code))

def init(*, id="run", resume="allow", **options):
    assert resume == "allow"
    if os.environ.get("WANDB_NETWORK") == "down":
        raise CommError("Run initialization has timed out after 90.0 sec.")
    if "WANDB_KEPT" not in os.environ:
        raise UsageError("No API key configured. Use `wandb login` to log in.")
    global run
    run = Run(id, options)
    return run

def log(values, step, commit):  # in the last run, whose step is open until there is another
    run._next = max(run._next - 1, 0)
    run.log(values, step)
'''


def record(step: int, loss: float) -> dict[str, Any]:
    figures = {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens": 64, "tokens_per_s": 50.0, "mfu": 0.4}
    return {
        **figures,
        "step_time_s": 1.5,
        "memory_bytes": 1000,
        "sequences": 8,
        "skipped": False,
        **({"val_loss": 3.0} if step == 4 else {}),
    }


def start(folder: Path, tracker: Any, first: int, last: int, loss: float, said: list[str]) -> None:
    """A start of a run, as it continues after the step before `first`."""
    kept = RunFolder(folder, {"model": "m"}, {}, checkpoints=True, resuming=True)
    earlier = kept.continue_after(first - 1, {})
    tracking = Tracking(tracker, kept, first - 1, earlier, said.append)
    for step in range(first, last + 1):
        kept.write_step(record(step, loss))
        tracking.write(record(step, loss))
    tracking.close()
    kept.close()


def test_the_curves_are_the_figures_of_a_step() -> None:
    assert scalars(record(4, 2.0)) == {
        **{f"Train/{name}": value for name, value in (("loss", 2.0), ("lr", 1e-3), ("grad_norm", 1.0))},
        **{"Train/tokens_per_s": 50.0, "Train/mfu": 0.4, "Train/step_time_s": 1.5, "Train/memory_bytes": 1000},
        "Validation/loss": 3.0,
    }
    assert scalars({"step": 1, "loss": None, "nonfinite": ["loss"], "rank": 3}) == {"Train/rank": 3}  # a rule's


def read_tensorboard(folder: Path, validated: Sequence[int] = (4,)) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / EVENTS))
    shown.Reload()
    points = [(event.step, event.value) for event in shown.Scalars("Train/loss")]
    assert len({step for step, _ in points}) == len(points), "a point is doubled"
    validations = shown.Scalars("Validation/loss") if validated else []
    assert [event.step for event in validations] == list(validated)
    return {step: round(value, 6) for step, value in points}


def read_wandb(folder: Path) -> dict[int, float]:
    (run,) = (path for path in folder.parent.glob("kept/*") if path.suffix != ".json")
    points = [json.loads(line) for line in run.read_text().splitlines()]
    return {step: values["Train/loss"] for step, values in points}


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of wandb's interface, which is imported in its place."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(WANDB)
    (tmp_path / "kept").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_KEPT", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.mark.parametrize(("tracker", "read"), [("tensorboard", read_tensorboard), ("wandb", read_wandb)])
def test_a_resumed_run_goes_on_at_its_step_and_doubles_no_point(
    tracker: str, read: Callable[[Path], dict[int, float]], wandb: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = tmp_path / "run"
    start(folder, tracker, 1, 6, 2.0, said)  # it ends here; its last checkpoint is of step 4
    start(folder, tracker, 5, 8, 1.0, said)
    curve = read(folder)
    assert sorted(curve) == list(range(1, 9))
    assert [curve[step] for step in (4, 7, 8)] == [2.0, 1.0, 1.0]
    assert len(said) == 2 and all(line.startswith("curves in ") for line in said)
    if tracker == "wandb":
        options = json.loads((wandb / "options.json").read_text())
        assert (options["name"], options["project"], options["config"]) == ("run", "leanstate", {"model": "m"})


def test_a_tracker_that_is_asked_for_later_gets_the_steps_before(tmp_path: Path) -> None:
    kept = RunFolder(tmp_path / "run", {}, {}, checkpoints=True, resuming=True)
    for step in range(1, 5):
        kept.write_step(record(step, 2.0))
    kept.close()
    start(tmp_path / "run", "tensorboard", 5, 6, 1.0, [])
    assert read_tensorboard(tmp_path / "run") == {1: 2.0, 2: 2.0, 3: 2.0, 4: 2.0, 5: 1.0, 6: 1.0}


def test_steps_that_were_made_without_it_get_to_wandb_later(wandb: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", "wandb", 1, 2, 2.0, [])
    kept = RunFolder(tmp_path / "run", {}, {}, checkpoints=True, resuming=True)
    for step in (3, 4):
        kept.write_step(record(step, 3.0))
    kept.close()
    start(tmp_path / "run", "wandb", 5, 5, 1.0, [])
    assert read_wandb(tmp_path / "run") == {1: 2.0, 2: 2.0, 3: 3.0, 4: 3.0, 5: 1.0}


def test_the_end_of_a_run_waits_for_the_network_no_longer_than_it_says(
    wandb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = RunFolder(tmp_path / "run", {}, {}, checkpoints=True, resuming=True)
    said: list[str] = []
    Tracking("wandb", kept, 0, [], said.append).close(failed=True)
    assert json.loads((wandb / "ended.json").read_text()) == 1
    tracking = Tracking("wandb", kept, 0, [], said.append)
    back = threading.Event()
    monkeypatch.setattr(tracking._writer._run, "finish", lambda exit_code: back.wait(60))  # type: ignore[union-attr]
    monkeypatch.setattr("toolkit.run.tracking._FAILED_SECONDS", 0.01)
    tracking.close(failed=True)
    back.set()
    kept.close()
    assert said[2:] == ["note: --track wandb: it has not ended within 0 s; metrics.jsonl has every step."]


def test_deepspeeds_own_monitor_of_wandb_is_refused_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["toolkit", "train", "--track", "wandb", "--set", 'wandb={"enabled": true}']
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--track wandb and wandb.enabled in the DeepSpeed JSON would write to one" in capsys.readouterr().err
    check_one("tensorboard", {"wandb": {"enabled": True}})
    check_one("wandb", {"wandb": {"enabled": False}})


def test_none_ends_what_a_checkpoint_has_also_through_the_launcher() -> None:
    asked = parse(["--track", "none", "--run-dir", "r"])
    assert asked is not None
    again = parse(Restarts(asked, 1)._line(None))
    assert again is not None and again.track == "none" and again.tracker is None
    assert kept_settings(again, Saved(settings={"track": "wandb"}), {})[0].tracker is None
    opened = parse([])
    assert opened is not None
    assert kept_settings(opened, Saved(settings={"track": "wandb"}), {})[0].tracker == "wandb"


def test_what_does_not_start_is_a_sentence_and_what_fails_later_a_note(
    wandb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = RunFolder(tmp_path / "run", {}, {}, checkpoints=True, resuming=True)
    said: list[str] = []
    tracking = Tracking("wandb", kept, 0, [], said.append)
    tracking.write(record(5, 2.0))
    tracking._writer._next = 0  # type: ignore[union-attr]
    tracking.write(record(3, 2.0))
    tracking.write(record(2, 2.0))
    tracking.close()
    assert said[1:] == [
        "note: --track wandb: wandb drops a step that is not the next; nothing more is written there, and the run "
        "continues: metrics.jsonl has every step, and the next start of the run brings them there."
    ]
    monkeypatch.delenv("WANDB_KEPT")
    with pytest.raises(
        UserError, match=r": No API key configured.*WANDB_MODE=offline .*; --track none does without\.$"
    ):
        Tracking("wandb", kept, 0, [], said.append)
    Tracking("wandb", kept, 3, [record(3, 2.0)], said.append).write(record(4, 2.0))  # a run that is resumed continues
    assert len(said) == 3 and said[-1].startswith("note: --track wandb: No API key configured.")
    kept.close()
    assert not (tmp_path / "run").exists()


def test_an_outage_when_a_run_begins_is_a_note_and_the_next_start_has_all_steps(
    wandb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = tmp_path / "run", list[str]()
    folder.mkdir()
    (folder / EVENTS).touch()  # nothing can be written there
    start(folder, "tensorboard", 1, 4, 2.0, said)
    monkeypatch.setenv("WANDB_NETWORK", "down")
    start(tmp_path / "other", "wandb", 1, 4, 2.0, said)
    assert [line.partition(";")[0] for line in said] == [
        f"note: --track tensorboard: {folder / EVENTS}: File exists",
        "note: --track wandb: Run initialization has timed out after 90.0 sec",
    ]
    (folder / EVENTS).unlink()
    monkeypatch.delenv("WANDB_NETWORK")
    start(folder, "tensorboard", 5, 6, 1.0, said)
    start(tmp_path / "other", "wandb", 5, 6, 1.0, said)
    whole = {**dict.fromkeys(range(1, 5), 2.0), 5: 1.0, 6: 1.0}
    assert read_tensorboard(folder) == whole and read_wandb(tmp_path / "other") == whole


def test_steps_that_a_full_disk_broke_off_are_made_up_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, said = tmp_path / "run", list[str]()
    kept = RunFolder(folder, {}, {}, checkpoints=True, resuming=True)
    tracking = Tracking("tensorboard", kept, 0, [], said.append)
    tracking.write(record(1, 2.0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (events,) = (folder / EVENTS).iterdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + 700, before[1]))
    try:
        for step in range(2, 7):  # the file ends in the middle of one of them
            tracking.write(record(step, 2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tracking.close()
    for step in range(1, 7):
        kept.write_step(record(step, 2.0))
    kept.close()
    assert len(said) == 2 and said[1].startswith("note: --track tensorboard: ")
    assert "File too large; nothing more is written there" in said[1]
    assert "Traceback" not in capsys.readouterr().err, "TensorBoard's thread says the same, at length"
    start(folder, "tensorboard", 7, 8, 1.0, said)
    assert read_tensorboard(folder) == {**dict.fromkeys(range(1, 7), 2.0), 7: 1.0, 8: 1.0}


def read_csv(folder: Path) -> list[str]:
    return (folder / "Train_loss.csv").read_text().splitlines()


def test_a_monitor_of_the_json_that_fails_ends_neither_the_run_nor_the_others(one_rank: None, tmp_path: Path) -> None:
    said: list[str] = []
    places = {"output_path": str(tmp_path), "job_name": "csv"}
    config = {"csv_monitor": {"enabled": True, **places}, "tensorboard": {"enabled": True, **places, "job_name": "run"}}
    monitors = Monitors(config, said.append)
    monitors.write(1, {"Train/loss": 2.0})
    assert read_csv(tmp_path / "csv") == ["step,loss", "1,2.0"]
    shutil.rmtree(tmp_path / "csv")
    (tmp_path / "csv").touch()  # nothing can be written there
    for step in (2, 3):
        monitors.write(step, {"Train/loss": 2.0})
    assert len(said) == 1 and said[0].startswith("note: csv_monitor of the DeepSpeed JSON: ")
    assert said[0].endswith(
        "Not a directory; nothing more is written there, and the run continues: metrics.jsonl has every step."
    )
    (tmp_path / "run").rename(tmp_path / EVENTS)
    assert read_tensorboard(tmp_path, validated=[]) == {1: 2.0, 2: 2.0, 3: 2.0}


def test_a_monitor_of_the_json_that_does_not_start_ends_no_run(
    wandb: Path, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    (tmp_path / "curves").touch()  # there can be no folder
    at = {"enabled": True, "output_path": str(tmp_path), "job_name": "curves"}
    config = {"tensorboard": at, "wandb": {"enabled": True}, "csv_monitor": {**at, "job_name": "csv"}}
    monkeypatch.delenv("WANDB_KEPT")
    monitors = Monitors(config, said.append)
    monitors.write(1, {"Train/loss": 2.0})
    monitors.write_events([("Train/Samples/lr", 1e-3, 8)])
    assert [line.partition(";")[0] for line in said] == [
        f"note: tensorboard of the DeepSpeed JSON: {tmp_path / 'curves'}: File exists",
        "note: wandb of the DeepSpeed JSON: No API key configured. Use `wandb login` to log in",
    ]
    assert monitors.enabled and read_csv(tmp_path / "csv") == ["step,loss", "1,2.0"]
    assert not Monitors({"wandb": {"enabled": True}}, said.append).enabled


def test_wandb_gets_every_step_of_a_run_beside_the_sequences_that_the_engine_counts(
    wandb: Path, one_rank: None, tmp_path: Path
) -> None:
    """It drops a step below the last: of two counts one at most can be its axis."""
    said: list[str] = []
    monitors = Monitors({"wandb": {"enabled": True, "project": "mine"}}, said.append)
    for step in (1, 2, 3):
        monitors.write_events([("Train/Samples/lr", 1e-3, 8 * step)])
        monitors.write(step, {"Train/loss": 2.0, "Train/lr": 1e-3})
    points = [json.loads(line) for line in (wandb / "run").read_text().splitlines()]
    assert said == [] and [step for step, _ in points] == [1, 1, 2, 2, 3, 3]
    assert {name for _, values in points for name in values} == {"Train/loss", "Train/lr"}


@pytest.mark.parametrize(
    ("section", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")]
)
def test_a_monitor_whose_package_is_missing_is_said_before_ranks_start(
    section: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else found(name, *more)
    )
    monkeypatch.setattr(sys, "argv", ["toolkit", "train", "--set", f"{section}.enabled=True"])  # a string
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {section}.enabled in the DeepSpeed JSON needs a package that is not installed: pip install {package}, "
        f"or --set {section}.enabled=false.\n"
    )
    check_packages({section: {"enabled": False}, "csv_monitor": {"enabled": True}})


def test_a_package_that_is_missing_is_said_before_ranks_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else found(name, *more)
    )
    monkeypatch.setattr(sys, "argv", ["toolkit", "train", "--report_to", "wandb"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = "error: --track wandb needs a package that is not installed: pip install wandb, or give --track none.\n"
    assert capsys.readouterr().err == said
    check(None)
