"""Ranks, plugins, and whole small runs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from ranks import launched
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toolkit.agreed import AgreedError
from toolkit.errors import UserError
from toolkit.models import flops_per_token, load_config
from toolkit.plugins import import_plugin
from toolkit.records.run import EVENTS, read_metrics
from toolkit.run import ranks
from toolkit.usage import SHELL_PATH

REPOSITORY = Path(__file__).resolve().parents[2]


# Ranks, plugins


def test_rank_zero_prints_an_error_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.0)
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        ranks.report(AgreedError("the sentence."))
    assert capsys.readouterr().err == "error: the sentence.\n"


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_segments_can_grow_unless_the_user_says_otherwise(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {} if name is None else {name: "max_split_size_mb:512"}
    path = os.environ["PATH"]
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], **given})
    ranks.prepare_environment()
    found = {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")}
    assert found == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
    assert os.environ[SHELL_PATH] == path, "what is said to be typed next is for the user's shell"


@pytest.mark.parametrize(("rank", "terminal", "shown"), [("0", True, True), ("0", False, False), ("1", True, False)])
def test_bars_of_libraries_are_for_one_rank_on_a_terminal(
    rank: str, terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], "RANK": rank})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with warnings.catch_warnings():
        ranks.prepare_environment()
    assert ("HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ) == shown


def test_the_allocator_is_set_before_torch_is_there() -> None:
    script = "import sys, toolkit.train; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)


def test_plugins_are_imported_or_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    bad.write_text("1 / 0\n")
    import_plugin(good)
    assert (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="bad.py: ZeroDivisionError: division by zero"):
        import_plugin(bad)
    bad.write_text("raise SystemExit(0)\n")
    with pytest.raises(UserError, match="bad.py: SystemExit: 0"):
        import_plugin(bad)
    with pytest.raises(UserError, match="there is no such file"):
        import_plugin(tmp_path / "absent.py")


# Whole runs


def start(*arguments: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, that begins with nothing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "toolkit.train", *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_launcher_exits_with_2_and_one_sentence(tmp_path: Path) -> None:
    status, said = launched(tmp_path, 2, REPOSITORY / "launch" / "train.py", "--model", "qwen3-tinny")
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert (status, len(errors)) == (2, 1) and "'qwen3-tiny'" in errors[0], said


@pytest.fixture(scope="module")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    lines = (json.dumps({"text": f"Document {n} counts: " + " ".join(map(str, range(n, n + 60)))}) for n in range(300))
    path.write_text("\n".join(lines) + "\n")
    return path


def small_run(small_text: Path, folder: Path, *more: str) -> list[str]:
    line = f"--data {small_text} --config adamw_zero1 --seq-len 32 --micro-batch 2 --grad-accum 2 --run-dir {folder}"
    return [*line.split(), *more]


def test_one_process_without_a_launcher_trains(small_text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = small_run(small_text, folder, "--steps", "4", "--eval-every", "2", "--eval-sequences", "3")
    monitor = f'csv_monitor={{"enabled": true, "output_path": "{tmp_path}/monitor", "job_name": "csv"}}'
    process = start(*arguments, "--set", monitor, "--track", "tensorboard")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "memory_bytes", "step_time_s", "skipped"} <= set(records[0])
    assert [step for step, record in enumerate(records, 1) if "val_loss" in record] == [2, 4]
    assert [record.get("between_s", 0.0) > 0 for record in records] == [False, True, True, True]
    for record in records:
        assert 0 <= record["data_seconds"] < record["step_time_s"] and "mfu" not in record
        per_token = record["flops_per_s"] / record["tokens_per_s"]
        assert per_token == pytest.approx(flops_per_token(load_config("qwen3-tiny")[0], 32))
    # An untrained model is as unsure as a uniform guess over its 4,096 tokens.
    assert abs(records[0]["loss"] - math.log(4096)) < 0.5
    assert records[-1]["lr"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val_loss"] == records[-1]["val_loss"] and not summary["interrupted"]
    assert summary["tokens"] == 4 * 4 * 32
    run = json.loads((folder / "run.json").read_text())
    assert (run["world_size"], run["global_batch"], run["parameters"]) == (1, 4, summary["parameters"])
    config = json.loads((folder / "ds_config.json").read_text())
    assert config["train_batch_size"] == 4
    assert config["zero_optimization"]["reduce_bucket_size"] == 4_194_304  # "auto" in the shipped file
    assert (folder / "loss.png").stat().st_size > 1000
    assert "Run finished" in out and str(summary["steps"]) in out
    assert list((tmp_path / "monitor" / "csv").glob("*loss*.csv"))
    curves = EventAccumulator(str(folder / EVENTS))
    curves.Reload()
    for name, key in (("Train/loss", "loss"), ("Train/lr", "lr"), ("Validation/loss", "val_loss")):
        drawn = [(event.step, event.value) for event in curves.Scalars(name)]
        assert drawn == [(one["step"], pytest.approx(one[key])) for one in records if key in one]

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("summary.json", "loss.png"):  # as if the disk had been full in the end
        (folder / name).unlink()
    for more, status, said in (("none", 2, "already holds a run"), ("auto", 0, "nothing to do")):
        again = start(*arguments, "--resume", more, "--json")
        out, err = again.communicate(timeout=120)
        assert (again.returncode, said in err) == (status, True), out + err
    assert "and are now." in err and "Run finished" in err
    assert json.loads(out) == json.loads((folder / "summary.json").read_text()), "nothing else is on stdout"
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    first, second = (json.loads(files.pop(folder / "summary.json")) for files in (before, after))
    assert after == before
    assert second.pop("peak_memory_bytes") <= first.pop("peak_memory_bytes")  # the last checkpoint knows no later one
    assert second == first and first["predicted_peak_bytes"] > 0


def test_an_interrupted_run_stops_with_a_summary(small_text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(*small_run(small_text, folder, "--steps", "100000", "--eval-every", "0"))
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and len(read_metrics(metrics)) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "Run interrupted" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == len(read_metrics(metrics)) >= 3
