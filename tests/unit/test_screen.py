"""The screen: progress and summary, on rank 0 only."""

from __future__ import annotations

import io
import math
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from toolkit import console as console_of
from toolkit.records.sizes import counted, size_text
from toolkit.run.prepare import PreparedRun
from toolkit.run.screen import Screen
from toolkit.run.settings import RunSettings
from toolkit.run.summary import trained_parameters
from toolkit.usage import SHELL_PATH, to_type

SUMMARY: dict[str, Any] = {
    "run_dir": "runs/[a]",
    "interrupted": False,
    "steps": 30,
    "tokens": 61_440,
    "seconds": 12.0,
    "compile_s": 24.0,
    "skipped_documents": 0,
    "skipped_documents_first": [],
    "replaced_characters": 0,
    "cut_conversations": 0,
    "loss": 4.25,
    "loss_steps": 10,
    "val_loss": None,
    "tokens_per_s": 5120.0,
    "flops_per_s": 3.25e12,
    "mfu": 0.4125,
    "data_seconds": 0.03,
    "peak_memory_bytes": 743_600_000,
    "memory_kind": "resident",
    "process_bytes": 603_000_000,
    "predicted_peak_bytes": 140_000_000,
    "state_bytes_by_name": {"m_fast": 5_000_000, "v": 900},
    "state_bytes_per_parameter": 3.05,
    "state_bytes_per_parameter_per_rank": 1.525,
}


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 4.0,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "tokens": 2048,
        "tokens_per_s": 5120.0,
        "flops_per_s": 2.5e9,
        "mfu": 0.4,
        "memory_bytes": 700_000_000,
        "skipped": False,
        **more,
    }


@pytest.mark.parametrize("terminal", [False, True])
def test_screen_shows_progress_and_summary(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHELL_PATH, str(program_folder(tmp_path / "bin", monkeypatch)))
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=terminal, highlight=False)
    with Screen(240, shown=True, console=console) as screen:
        for step in range(1, 241):
            screen.step(record(step, **({"val_loss": None} if step == 120 else {})))
        screen.step(record(241, loss=None, skipped=True))
    screen.summary(SUMMARY)
    shown = out.getvalue()
    figures = (
        "in 12 s, after 24 s of compiling",
        "4.2500",
        "not measured",
        "5,120 tokens/s, 3.25 TFLOP/s (MFU 41.2%)",
        "0.25% of the time",
        "743.60 MB",
        "before the model │ 603.00 MB",
        "since then       │ 140.60 MB: the model and its steps, libraries that load",
        "140.00 MB, of the model and its steps alone",
        "next:\n  toolkit report 'runs/[a]'\n",
        "3.05",
        "m_fast 5.00 MB, v 900 B",
    )
    for expected in ("runs/[a]", *figures):
        assert expected in shown
    assert "validation loss not finite" in shown and "the gradient is not finite" in shown
    assert "toolkit sample" not in shown, "the folder has no checkpoint"
    if not terminal:
        assert sum(line.startswith("step") for line in shown.splitlines()) < 32
        assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({}, "3.05 bytes per parameter, 1.52 of"),  # of a run of an older version
        ({"parameters": 5000, "trained_parameters": 5000}, "3.05 bytes per parameter, 1.52 of"),
        ({"parameters": 5000, "trained_parameters": 80}, "3.05 bytes per trained parameter, 1.52 of"),
    ],
)
def test_of_frozen_parameters_state_is_not_counted(trained: dict[str, int], words: str) -> None:
    out = io.StringIO()
    Screen(1, shown=True, console=Console(file=out, width=200)).summary(SUMMARY | trained)
    assert words in out.getvalue()


def test_trained_parameters_are_whole_ones_without_those_that_are_frozen() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False))
    assert trained_parameters(module) == 21
    module[0].requires_grad_(False)
    shell: Any = module[1].weight
    shell.ds_numel, shell.data = shell.numel(), torch.empty(0)  # as at ZeRO stage 3
    assert trained_parameters(module) == 6


@pytest.mark.parametrize("terminal", [False, True])
def test_the_screen_shows_what_the_rule_reports(terminal: bool) -> None:
    lines: tuple[tuple[dict[str, Any], str], ...] = (
        ({"beta": 0.925, "[b]": 2.0}, "beta 0.9250  [b] 2.0000  5,120 tok/s"),
        ({"beta": None}, "beta not finite"),
    )
    for reported, figures in lines:
        out = io.StringIO()
        console = Console(file=out, width=120, force_terminal=terminal, highlight=False)
        with Screen(1, shown=True, console=console) as screen:
            screen.step(record(1, other=7.0, **reported), reported)
        assert figures in out.getvalue() and "other" not in out.getvalue()


@pytest.mark.parametrize("seconds", [0.5, 45.0])
def test_time_left_is_that_of_the_later_steps(seconds: float) -> None:
    now = 0.0
    console = Console(file=io.StringIO(), force_terminal=True, get_time=lambda: now)
    with Screen(100, shown=True, console=console) as screen:
        for step in range(1, 11):
            now += 60.0 if step == 1 else seconds
            screen.step(record(step))
        assert screen._bar is not None
        assert screen._bar.tasks[0].time_remaining == math.ceil(90 * seconds)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_step_has_all_figures_and_a_resumed_run_counts_on(terminal: bool) -> None:
    now = 0.0
    out = io.StringIO()
    console = Console(file=out, width=300, force_terminal=terminal, color_system=None, get_time=lambda: now)
    screen = Screen(20, shown=True, console=console)
    screen.go_on([record(step, loss=2.0) for step in range(1, 11)], 80_000_000_000)
    with screen:
        for step in range(11, 16):
            now += 30.0
            screen.step(record(step, loss=4.0))
    shown = out.getvalue().splitlines()
    figures = (
        *("15/20", "0:02:30 < 0:02:30", "loss 4.0000 (last 10: 3.0000)", "grad norm 1.5000", "lr 1.00e-03"),
        *("5,120 tok/s", "2.50 GFLOP/s (MFU 40.0%)", "memory 700.00 MB of 80.00 GB", f"{15 * 2048:,} tokens"),
    )
    last = "".join(shown[-3:])
    assert [figure for figure in figures if figure not in last] == []


def test_the_end_names_files_and_what_to_type_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHELL_PATH, str(program_folder(tmp_path / "bin", monkeypatch)))
    folder = tmp_path / "a run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "loss.png").touch()
    out = io.StringIO()
    Screen(1, shown=True, console=Console(file=out, width=300)).summary(SUMMARY | {"run_dir": str(folder)})
    assert f"{folder}: loss.png, checkpoints" in out.getvalue()
    commands = [line.strip() for line in out.getvalue().partition("next:\n")[2].splitlines()]
    assert [shlex.split(line)[:3] for line in commands] == [
        ["toolkit", command, str(folder)] for command in ("report", "sample", "eval", "export")
    ]


def program_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of an environment: where Python and the program are."""
    folder.mkdir(parents=True)
    (folder / "toolkit").touch(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def test_a_command_is_shown_as_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = program_folder(tmp_path / "my env" / "bin", monkeypatch), tmp_path / "other"
    monkeypatch.setenv(SHELL_PATH, "/nowhere")
    assert to_type("toolkit report r") == f"'{own}/toolkit' report r"
    monkeypatch.chdir(tmp_path)
    assert to_type("toolkit report r") == "'my env/bin/toolkit' report r"
    other.mkdir()
    (other / "toolkit").touch(0o755)
    for found, shown in ((other, "'my env/bin/toolkit'"), (own, "toolkit")):
        monkeypatch.setenv(SHELL_PATH, str(found))
        assert to_type("toolkit report r") == f"{shown} report r"
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "toolkit").symlink_to(own / "toolkit")  # as pipx installs a program
    monkeypatch.setenv(SHELL_PATH, str(tmp_path / "links"))
    assert to_type("toolkit report r") == "toolkit report r"
    (own / "toolkit").unlink()
    assert to_type("toolkit report r") == "toolkit report r", "it is not installed there"


def test_the_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(3, shown=False) as screen:
        screen.say("hello")
        screen.step(record(1))
        screen.summary(SUMMARY)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("terminal", "seconds", "said"), [("1", 0.3, True), ("1", 0.0, False), ("", 0.3, False)])
def test_what_takes_long_says_so_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: str, seconds: float, said: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", terminal)
    monkeypatch.setattr(console_of, "PATIENCE_SECONDS", 0.1)
    with console_of.waiting("predicting"):
        time.sleep(seconds)
    printed = capsys.readouterr()
    assert ("predicting" in printed.err) is said and printed.out == ""


def test_one_is_no_plural() -> None:
    assert [counted(n, "step") for n in (0, 1, 2, 2000)] == ["0 steps", "1 step", "2 steps", "2,000 steps"]
    assert [counted(n, "loss", "losses") for n in (1, 2)] == ["1 loss", "2 losses"]
    out = io.StringIO()
    one = {name: 1 for name in ("loss_steps", "skipped_documents", "replaced_characters", "cut_conversations")}
    Screen(1, shown=True, console=Console(file=out, width=200)).summary(SUMMARY | one)
    for words in ("(of the last step)", "1 document that", "1 character of the text", "1 conversation that is longer"):
        assert words in out.getvalue()


def test_the_header_of_a_run_of_one(tmp_path: Path) -> None:
    def header(steps: int, total: int, ranks: int, seq_len: int, validation: int) -> list[str]:
        batch = SimpleNamespace(total=total, micro=total, accumulation=1, world_size=ranks)
        settings = RunSettings(steps=steps, seq_len=seq_len, eval_every=1, eval_sequences=2)
        run: Any = SimpleNamespace(settings=settings, batch=batch, remarks=[], validation=[0] * validation)
        run.parameters, run.folder = 5, tmp_path
        return PreparedRun.lines(run, torch.device("cpu"))

    one = header(1, 1, 1, 1, 1)
    assert one[1] == "1 step of 1 sequence x 1 token: micro-batch 1 x accumulation 1 x 1 rank"
    assert one[-1] == "note: the validation text fills only 1 sequence; it is used."
    many = header(20, 8, 2, 128, 0)
    assert many[1] == "20 steps of 8 sequences x 128 tokens: micro-batch 8 x accumulation 1 x 2 ranks"
    assert many[-1] == "note: the validation text fills only 0 sequences; all are used."


def test_size_text() -> None:
    assert [size_text(n) for n in (12, 1_500, 2_000_000, 3e9)] == ["12 B", "1.50 kB", "2.00 MB", "3.00 GB"]
