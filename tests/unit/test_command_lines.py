"""Wrong command lines: one sentence and status 2, never a traceback, a success without a result, or a lost file."""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_run, write_training

from toolkit import cli
from toolkit.checkpoint.export import DTYPES
from toolkit.commands import estimate as commands
from toolkit.commands.checkpoint import find
from toolkit.errors import UserError
from toolkit.report import build_report, report_paths, write_report
from toolkit.run.settings import RunSettings, parse


def world(root: Path) -> Path:
    """A folder with a bit of everything that a user may point at."""
    write_run(root / "runs" / "first")
    write_training(root / "runs" / "second", steps=5)
    (root / "runs" / "second" / "checkpoints").mkdir()
    (root / "empty").mkdir()
    hf = root / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (hf / "model.safetensors").write_bytes(b"weights")
    broken = root / "broken" / "checkpoints" / "global_step7"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text('{"format": 1}')
    (root / "notes.md").write_text("# My notes\n")
    (root / "own.json").write_text('{"optimizer": {"type": "AdamW"}, "train_batch_size": "many"}')
    (root / "data.json").write_text("[1, 2")
    (root / "binary").write_bytes(bytes(range(256)))
    return root


def hashes(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["toolkit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code is None or isinstance(ended.value.code, int)
    return int(ended.value.code or 0)


# One at a time


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("runs", "is no run, but holds some: first, second; give one of them"),
        ("runs/second", "has no checkpoint: it saved none yet, or was started with --save-every 0"),
        ("hf", "is a Hugging Face model and no checkpoint; expected is a run's folder"),
        ("empty", "is an empty folder; expected is a run's folder"),
        ("notes.md", "is a file; expected is a run's folder"),
        ("runs/fist", "there is no such folder; expected is a run's folder"),
        ("runs/firs", "Did you mean 'first'?"),
        ("runs/first/memory", "holds no checkpoint; expected is"),
    ],
)
@pytest.mark.parametrize("command", ["export", "checkpoint inspect", "checkpoint verify", "checkpoint convert"])
def test_what_a_wrong_folder_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    path: str,
    words: str,
) -> None:
    before = hashes(world(tmp_path))
    monkeypatch.chdir(tmp_path)
    more = [] if "inspect" in command or "verify" in command else ["--out", "new"]
    assert run(monkeypatch, *command.split(), path, *more) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.startswith("error: ") and printed.count("\n") == 1
    assert hashes(tmp_path) == before


def test_a_latest_that_names_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(UserError, match="latest names 'global_step9', which is no checkpoint"):
        find(tmp_path)


@pytest.mark.parametrize("name", [*DTYPES, "torch.float32", "FP32", "Float32", "torch.bfloat16", "BF16"])
def test_dtypes_go_by_their_usual_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "export", str(tmp_path), "--out", str(tmp_path / "new"), "--dtype", name) == 2
    assert "is an empty folder" in capsys.readouterr().err  # the dtype was taken


@pytest.mark.parametrize("name", ["int8", "fp8", "fp64", "32"])
def test_other_dtypes_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "export", str(tmp_path), "--out", "new", "--dtype", name) == 2
    assert f"--dtype is '{name}', but must be bf16, fp16 or fp32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("x.html", {"html": "x.html"}),
        ("x.HTM", {"html": "x.HTM"}),
        ("x.markdown", {"markdown": "x.markdown"}),
        ("new", {"html": "new/report.html", "markdown": "new/report.md", "json": "new/report.json"}),
        ("run-1.5", {kind: f"run-1.5/report{end}" for kind, end in (("html", ".html"), ("markdown", ".md"))}),
    ],
)
def test_a_report_goes_where_its_suffix_says(out: str, expected: dict[str, str]) -> None:
    kinds = ("html", "markdown") if out == "run-1.5" else ()
    assert report_paths([Path("a")], Path(out), kinds) == {kind: Path(path) for kind, path in expected.items()}


@pytest.mark.parametrize("out", ["x.pdf", "x.txt", "x.docx", "a.b/x.PDF", "x.tar", "x.png"])
def test_a_report_of_another_kind_is_refused(out: str) -> None:
    with pytest.raises(UserError, match=r"is an \.html, \.md or \.json file, no \."):
        report_paths([Path("a")], Path(out), ())


@pytest.mark.parametrize("name", ["notes.md", "own.json", "runs/first/run.json", "runs/first/summary.json"])
def test_a_report_replaces_reports_only(name: str, tmp_path: Path) -> None:
    root = world(tmp_path)
    report = build_report([root / "runs" / "first"])
    before = hashes(root)
    with pytest.raises(UserError, match="is there already and is no report"):
        write_report(report, report_paths([root / "runs" / "first"], root / name, ()))
    assert hashes(root) == before
    for _ in range(2):  # of its own, as often as one likes
        write_report(report, report_paths([root / "runs" / "first"], None, ()))


def test_estimate_plan_and_train_begin_with_the_same_values() -> None:
    def defaults(command: Any) -> dict[str, Any]:
        parameters = inspect.signature(command).parameters.values()
        return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}

    estimate, plan = defaults(commands.estimate), defaults(commands.plan)
    train = RunSettings().model_dump()
    for name in estimate.keys() & plan.keys():
        assert estimate[name] == plan[name], name
    for name in (estimate.keys() | plan.keys()) & train.keys():
        for of in (estimate, plan):
            assert of.get(name, train[name]) in (train[name], None), name
    assert estimate["seq_len"] == plan["seq_len"] == train["seq_len"] == 256


# Many at once

NUMBERS = ["-1", "0", "1", "2", "1e9", "nan", "999999999999999999999", "two", "", "0x10", "1.5", " 3"]
SIZES = ["80", "80G", "80GiB", "-80GB", "0", "80 GB", "x", "", "80000", "1e3GB", "999999999TB"]
PATHS = ["runs", "runs/first", "runs/second", "empty", "hf", "broken", "notes.md", "own.json", "data.json", "binary"]
PATHS += ["absent", "", ".", "/", "/dev/null", "a\x00b", "x" * 300, "hf/config.json", "runs/first/run.json", "~", "*"]
NAMES = ["qwen3-tiny", "qwen3-tinny", "hf", "empty", "notes.md", "", "absent/model", "[red]x[/red]", "\x1b[31m", "-"]
CONFIGS = ["amcs_zero2", "amcs_zero22", "adamw_zero3", "own.json", "data.json", "binary", "empty", "", "/dev/null"]
SETS = [
    "a",
    "=",
    "a=1",
    "optimizer=1",
    "optimizer.params.state_format=9bit",
    "zero_optimization.stage=9",
    ".=",
    "a..b=1",
]
WORDS = ["cuda", "cpu", "tpu", "", "8bit", "any", "plain", "chunked", "flash", "html", "pdf", "all"]
OUTS = [
    "new",
    "new.json",
    "new.pdf",
    "notes.md",
    "own.json",
    "empty",
    "hf",
    "runs",
    "binary",
    "notes.md/x",
    "/dev/full",
]

COMMANDS: dict[str, tuple[tuple[list[str], ...], dict[str, list[str]]]] = {
    "configs": ((CONFIGS,), {"--nmae": [""]}),
    "estimate": (
        (),
        {
            "--model": NAMES,
            "--config": CONFIGS,
            "--set": SETS,
            "--plugin": PATHS,
            "--ranks": NUMBERS,
            "--nodes": NUMBERS,
        }
        | {"--micro-batch": NUMBERS, "--seq-len": NUMBERS, "--loss": WORDS, "--attention": WORDS, "--device": WORDS}
        | {"--gpu-memory": SIZES, "--optimizer": WORDS, "--batch-size": NUMBERS, "--global-batch": NUMBERS},
    ),
    "plan": (
        (),
        {"--model": NAMES[1:], "--gpu-memory": SIZES, "--host-memory": SIZES, "--ranks": NUMBERS, "--optimizer": WORDS}
        | {"--state-format": WORDS, "--seq-len": NUMBERS, "--out": OUTS},
    ),
    "report": ((PATHS, PATHS), {"--out": OUTS, "--format": WORDS, "--runs": PATHS}),
    "export": ((PATHS,), {"--out": OUTS, "--dtype": [*WORDS, "float32"], "--output": PATHS}),
    "checkpoint inspect": ((PATHS,), {"--digest": [], "--json": []}),
    "checkpoint verify": ((PATHS,), {"--all": []}),
    "checkpoint convert": ((PATHS,), {"--out": OUTS, "--ranks": NUMBERS, "--zero-stage": NUMBERS, "--universal": []}),
    "checkpoint": ((WORDS,), {}),
    "": ((WORDS,), {"--version": WORDS, "--verbose": []}),
}


def lines(seed: int, count: int) -> list[list[str]]:
    """Generated command lines: each with up to four options, values that fit as well as any others, and some lost."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        command = draw.choice(list(COMMANDS))
        arguments, options = COMMANDS[command]
        line = command.split()
        line += [draw.choice(values) for values in arguments if draw.random() < 0.85]
        for option in draw.sample(sorted(options), min(len(options), draw.randint(0, 4))):
            line.append(option)
            if options[option] and draw.random() < 0.95:
                line.append(draw.choice(options[option]))
        if draw.random() < 0.05:
            draw.shuffle(line)
        found.append(line)
    return found


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 25))])
def test_no_command_line_ends_in_a_traceback_or_loses_a_file(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = world(tmp_path / "world")
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = hashes(root)
    statuses: list[int] = []
    for line in lines(seed, 120):
        status = run(monkeypatch, *line)
        printed = capsys.readouterr()
        statuses.append(status)
        assert status in (0, 1, 2), line
        assert "Traceback" not in printed.out + printed.err, line
        assert printed.out or printed.err, line
        if status == 2:
            help_shown = printed.err.startswith("Usage:")
            last = printed.err.rstrip("\n").splitlines()[-1]
            assert help_shown or last.startswith("error: "), (line, printed.err)
        now = hashes(root)
        made = {name: now[name] for name in now if name not in before}
        assert {name: now.get(name) for name in before} == before, line
        assert status == 0 or not made, (line, made)
        before = now
    assert seed or statuses.count(0) > 2, "what is right is done"  # of other seeds, some hold no right line


ALL_FLAGS = ["--steps", "--seq-len", "--micro-batch", "--grad-accum", "--global-batch", "--lr", "--warmup", "--seed"]
ALL_FLAGS += [
    "--eval-every",
    "--save-every",
    "--keep-last",
    "--max-skipped",
    "--loss",
    "--run-dir",
    "--resume",
    "--data",
]
ALL_FLAGS += ["--optimizer", "--batch-size", "--epochs", "--num_gpus", "--lr-rate", "--set", "--config", "--deepspeed"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 25))])
def test_no_training_line_ends_in_a_traceback(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(seed)
    accepted = 0
    for _ in range(120):
        line = []
        for flag in draw.sample(ALL_FLAGS, draw.randint(0, 3)):
            line += [flag, draw.choice([*NUMBERS, *WORDS, *SETS])][: draw.choice((1, 2, 2, 2))]
        try:
            settings = parse(line)
        except UserError as error:
            assert "\n" not in str(error) and str(error), line
        else:
            accepted += settings is not None
    assert accepted > 10
    assert "Traceback" not in capsys.readouterr().err
