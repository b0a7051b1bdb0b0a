"""Settings, batch arithmetic, flags in the JSON, the run folder, the screen, and whole small runs."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from toolkit.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch, resolve_batch
from toolkit.errors import UserError
from toolkit.plugins import import_plugin
from toolkit.records.run import read_metrics, strict
from toolkit.records.sizes import size_text
from toolkit.run import ranks
from toolkit.run import start as starts
from toolkit.run.folder import RunFolder, check_free, default_folder, plot_loss
from toolkit.run.merge import merge_flags
from toolkit.run.screen import Screen
from toolkit.run.settings import RunSettings, parse

REPOSITORY = Path(__file__).resolve().parents[2]
JSON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AMCS", "params": {"lr": 6e-4}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 640, "warmup_num_steps": 64, "warmup_type": "linear"},
    },
}
SMALL = st.integers(1, 64)


# Settings


def test_command_line_fills_every_setting(tmp_path: Path) -> None:
    line = (
        f"--local_rank=1 --deepspeed --model qwen3-134m --tokenizer mistral-32k --data fineweb --data-subset s "
        f"--text-column body --bad-documents stop --val-data held.txt --deepspeed_config soam_zero3 "
        f"--set a.b=1 --set c=x "
        f"--plugin {tmp_path}/p.py --steps 7 --seq-len 33 --micro-batch 2 --grad-accum 3 --global-batch 12 "
        f"--lr 1e-3 --warmup 0.2 --seed 5 --eval-every 0 --eval-sequences 9 --run-dir {tmp_path}/run "
        "--no-activation-checkpointing --loss plain --from-checkpoint --save-every 6 --keep-last 4 --keep-every 12 "
        "--resume none --convert-state --max-skipped 3 --memory-profile full --deterministic "
        "--trust-pickle"
    )
    settings = parse(line.split())
    assert settings == RunSettings(
        model="qwen3-134m",
        from_checkpoint=True,
        tokenizer="mistral-32k",
        data="fineweb",
        data_subset="s",
        text_column="body",
        bad_documents="stop",
        val_data="held.txt",
        config="soam_zero3",
        overrides=["a.b=1", "c=x"],
        plugins=[tmp_path / "p.py"],
        steps=7,
        seq_len=33,
        micro_batch=2,
        grad_accum=3,
        global_batch=12,
        lr=1e-3,
        warmup=0.2,
        seed=5,
        eval_every=0,
        eval_sequences=9,
        run_dir=tmp_path / "run",
        save_every=6,
        keep_last=4,
        keep_every=12,
        resume="none",
        convert_state=True,
        max_skipped=3,
        activation_checkpointing=False,
        loss="plain",
        memory_profile="full",
        deterministic=True,
        trust_pickle=True,
    )
    defaults = parse([])
    assert defaults == RunSettings()
    assert all(value != getattr(defaults, name) for name, value in settings)


def test_help_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--help"]) is None
    shown = capsys.readouterr().out
    assert "--global-batch" in shown and "local_rank" not in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--steps 0", "--steps is 0, but it should be greater than 0."),
        ("--micro-batch -1", "--micro-batch is -1, but it should be greater than 0."),
        ("--lr nan", "--lr is nan, but it should be a finite number."),
        ("--lr -1", "--lr is -1.0, but it should be greater than 0."),
        ("--lr inf", "--lr is inf, but it should be a finite number."),
        ("--warmup -0.1", "--warmup is -0.1, but it should be greater than or equal to 0."),
        ("--warmup 2.5", "--warmup is 2.5, but it must be a fraction below 1 or a whole number of steps."),
        ("--seed -1", "--seed is -1, but it should be greater than or equal to 0."),
        ("--steps many", "--steps"),
        ("--loss tiny", "'chunked'"),
        ("--memory-profile some", "'summary'"),
        ("--stepz 3", "--steps"),
        ("--optimizer adamw", "--config amcs_zero2, soam_zero2, adamw_zero2"),
        ("--batch-size 4", "--micro-batch (sequences per rank and forward pass) or --global-batch"),
        ("--batch_size 4", "--micro-batch"),
        ("--learning-rate 1", "Use --lr."),
        ("--learning_rate=1", "Use --lr."),
        ("--lr-rate 1", "Use --lr."),
        ("--epochs 3", "--steps, in optimizer steps"),
        ("--num_train_epochs 3", "--steps, in optimizer steps"),
        ("--num_gpus 2", "goes before the script: deepspeed --num_gpus N"),
        ("--num-gpus=2", "goes before the script"),
        ("--master_port 1", "goes before the script"),
        ("--hostfile h", "goes before the script"),
        ("--seq_len 9", "Did you mean '--seq-len'?"),
        ("--output_dir x", "Use --run-dir."),
        ("--gradient_accumulation_steps 2", "Use --grad-accum."),
        ("--bf16", "--set bf16.enabled=true"),
        ("--weight_decay 0.1", "--set optimizer.params.weight_decay=0.1"),
        ("--zero-stage 3", "--set zero_optimization.stage=2"),
        ("--deepspeed ds.json", "a DeepSpeed JSON is given with --config"),
        ("--zzzzzz", "--help lists what there is"),
        ("--tokenizer=", "--tokenizer is empty"),
        ("--steps", "--steps"),
        ("extra", "extra"),
    ],
)
def test_wrong_settings_are_one_sentence(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(line.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_value_is_no_folder() -> None:
    with pytest.raises(UserError, match="--run-dir is empty; is a variable of the shell not set"):
        parse(["--run-dir", ""])


@pytest.mark.parametrize("line", ["--resume", "--resume --steps 3", "--steps 3 --resume", "--resume auto"])
def test_a_bare_resume_is_auto(line: str) -> None:
    settings = parse(line.split())
    assert settings is not None and settings.resume == "auto"


def test_only_what_is_typed_is_set() -> None:
    settings = parse(["--steps", "500", "--set", "a.b=1", "--set", "c=", "--deepspeed", "--local_rank", "1"])
    assert settings is not None and settings.model_fields_set == {"steps", "overrides"}
    assert settings.overridden() == ["a.b", "c"]


# Batch arithmetic


@given(micro=SMALL, accumulation=SMALL, world=SMALL, missing=st.sampled_from([MICRO, ACCUMULATION, GLOBAL, None]))
def test_any_two_flags_give_the_third(micro: int, accumulation: int, world: int, missing: str | None) -> None:
    expected = Batch(micro, accumulation, world)
    flags: dict[str, int | None] = {MICRO: micro, ACCUMULATION: accumulation, GLOBAL: expected.total}
    if missing is not None:
        flags[missing] = None
    assert resolve_batch(flags, {"train_micro_batch_size_per_gpu": 3, "train_batch_size": 999}, world) == expected
    in_json = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    assert resolve_batch({}, {**in_json, "train_batch_size": expected.total}, world) == expected


@given(micro=SMALL, accumulation=SMALL, world=SMALL, total=st.integers(1, 4096))
def test_a_batch_that_does_not_multiply_is_refused(micro: int, accumulation: int, world: int, total: int) -> None:
    flags = {MICRO: micro, ACCUMULATION: accumulation, GLOBAL: total}
    if micro * accumulation * world == total:
        assert resolve_batch(flags, {}, world).total == total
        return
    with pytest.raises(UserError) as caught:
        resolve_batch(flags, {}, world)
    product = f"micro-batch {micro} * gradient accumulation {accumulation} * world size {world}"
    assert f"{product} = {micro * accumulation * world}, but the global batch is {total}." in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "config", "world", "expected"),
    [
        # A flag and the shipped JSON (micro-batch 4, accumulation 1).
        ({GLOBAL: 128}, JSON, 2, Batch(4, 16, 2)),
        # A micro-batch of the JSON gives way, one that is typed does not.
        ({GLOBAL: 4}, JSON, 2, Batch(2, 1, 2)),
        ({GLOBAL: 12}, JSON, 2, Batch(3, 2, 2)),
        ({GLOBAL: 10}, JSON, 2, Batch(1, 5, 2)),
        ({MICRO: 8}, JSON, 2, Batch(8, 1, 2)),
        ({ACCUMULATION: 3}, JSON, 2, Batch(4, 3, 2)),
        # A JSON that fixes the global batch keeps it.
        ({MICRO: 2}, {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}, 2, Batch(2, 4, 2)),
        ({ACCUMULATION: 2}, {"train_batch_size": 16}, 2, Batch(4, 2, 2)),
        ({}, {"train_batch_size": 16}, 2, Batch(8, 1, 2)),
        ({}, {"train_batch_size": 16, "train_micro_batch_size_per_gpu": "auto"}, 4, Batch(4, 1, 4)),
        ({}, {"train_micro_batch_size_per_gpu": 5}, 3, Batch(5, 1, 3)),
    ],
)
def test_flags_and_json_give_a_batch(
    flags: dict[str, int | None], config: dict[str, Any], world: int, expected: Batch
) -> None:
    assert resolve_batch(flags, config, world) == expected


@pytest.mark.parametrize(
    ("flags", "config", "message"),
    [
        ({GLOBAL: 10, MICRO: 4}, JSON, "micro-batch 4 * world size 2 = 8; nearest that fit: 8 or 16."),
        ({GLOBAL: 9}, JSON, "9 is not a multiple of world size 2; nearest that fit: 8 or 10."),
        ({GLOBAL: 3, ACCUMULATION: 2}, {}, "gradient accumulation 2 * world size 2 = 4; nearest that fit: 4."),
        ({}, {}, "the batch size is not given"),
        ({ACCUMULATION: 2}, {}, "the batch size is not given"),
        ({}, {"train_batch_size": 2.5}, "train_batch_size is 2.5"),
        ({}, {"train_batch_size": True}, "train_batch_size is True"),
        ({}, {"gradient_accumulation_steps": 0, "train_batch_size": 4}, "gradient_accumulation_steps is 0"),
    ],
)
def test_impossible_batches(flags: dict[str, int | None], config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        resolve_batch(flags, config, 2)
    assert message in str(caught.value)


# Flags written into the JSON


def test_flags_are_written_into_a_copy_of_the_json() -> None:
    before = copy.deepcopy(JSON)
    settings = RunSettings(steps=100, global_batch=32, lr=1e-3, warmup=0.25)
    merged, batch, remarks = merge_flags(JSON, settings, world_size=2)
    assert before == JSON
    assert batch == Batch(4, 4, 2) and remarks == []
    assert merged["train_batch_size"] == 32
    assert merged["train_micro_batch_size_per_gpu"] * merged["gradient_accumulation_steps"] * 2 == 32
    assert merged["optimizer"]["params"]["lr"] == 1e-3
    assert merged["scheduler"]["params"] == {
        "total_num_steps": 100,
        "warmup_num_steps": 25,
        "warmup_type": "linear",
    }


@pytest.mark.parametrize(
    ("kind", "params", "flags", "expected"),
    [
        # The JSON's own share of the run is kept, 10 % where it has none.
        ("WarmupCosineLR", {"total_num_steps": 640, "warmup_num_steps": 64}, {}, 20),
        ("WarmupDecayLR", {"total_num_steps": 100, "warmup_num_steps": 50}, {}, 100),
        ("WarmupCosineLR", {}, {}, 20),
        ("WarmupDecayLR", {"warmup_num_steps": "auto", "total_num_steps": "auto"}, {}, 20),
        ("WarmupLR", {"warmup_num_steps": 30}, {}, 30),
        ("WarmupLR", {"warmup_num_steps": 30}, {"warmup": 0.5}, 100),
        ("WarmupCosineLR", {"warmup_num_steps": 30}, {"warmup": 15}, 15),
        ("WarmupCosineLR", {"warmup_num_steps": 30}, {"warmup": 0}, 1),
    ],
)
def test_warmup(kind: str, params: dict[str, Any], flags: dict[str, Any], expected: int) -> None:
    config = {**JSON, "scheduler": {"type": kind, "params": params}}
    merged, _, _ = merge_flags(config, RunSettings(steps=200, lr=0.5, **flags), world_size=1)
    result = merged["scheduler"]["params"]
    assert result["warmup_num_steps"] == expected
    assert result.get("total_num_steps") == (None if kind == "WarmupLR" else 200)
    # These two would otherwise run at a peak of their own.
    assert result.get("warmup_max_lr") == (None if kind == "WarmupCosineLR" else 0.5)


def test_a_run_shorter_than_its_warmup_is_said_aloud() -> None:
    _, _, remarks = merge_flags(JSON, RunSettings(steps=20, warmup=50), world_size=1)
    assert remarks == ["the warm-up takes 50 steps and the run 20: the learning rate never gets past the warm-up."]


def test_auto_values_are_dropped() -> None:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AMCS", "params": {"lr": "auto", "weight_decay": "auto", "eps": 1e-8}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    merged, _, _ = merge_flags(config, RunSettings(micro_batch=2), world_size=1)
    assert merged["optimizer"]["params"] == {"eps": 1e-8}
    assert merged["zero_optimization"] == {"stage": 2}
    assert merged["train_micro_batch_size_per_gpu"] == 2


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"optimizer": None}, {}, "no 'optimizer' section"),
        ({"scheduler": None}, {"warmup": 0.1}, "--warmup needs a 'scheduler'"),
        ({"scheduler": {"type": "OneCycle"}}, {"warmup": 0.1}, "does not apply to scheduler 'OneCycle'"),
    ],
)
def test_flags_with_nowhere_to_go(change: dict[str, Any], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge_flags({**JSON, **change}, RunSettings(**flags), world_size=1)


# The run folder


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
    folder.write_summary({"loss": 2.5})
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
    with pytest.raises(UserError, match="which keeps no checkpoints"):
        RunFolder(tmp_path, {}, {}, resuming=True)
    # Somebody has removed the checkpoints of a longer run than one interval.
    (tmp_path / "checkpoints").mkdir()
    check_free(tmp_path, resuming=True)
    assert starts._from_the_start(RunSettings(save_every=1), tmp_path).step == 0
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n')
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


# The screen

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
    "loss": 4.25,
    "loss_steps": 10,
    "val_loss": None,
    "tokens_per_s": 5120.0,
    "peak_memory_bytes": 743_600_000,
    "memory_kind": "resident",
    "memory_files": "runs/x/memory",
    "state_bytes_by_name": {"m_fast": 5_000_000, "v": 900},
    "state_bytes_per_parameter": 3.05,
    "state_bytes_per_parameter_per_rank": 1.525,
}


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 4.0, "lr": 1e-3, "tokens_per_s": 5120.0, "skipped": False, **more}


@pytest.mark.parametrize("terminal", [False, True])
def test_screen_shows_progress_and_summary(terminal: bool) -> None:
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
        "5,120",
        "743.60 MB",
        "3.05",
        "m_fast 5.00 MB, v 900 B",
    )
    for expected in ("runs/[a]", "runs/x/memory", *figures):
        assert expected in shown
    assert "validation loss not finite" in shown and "the gradient is not finite" in shown
    if not terminal:
        assert sum(line.startswith("step") for line in shown.splitlines()) < 32
        assert "\x1b" not in shown


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


def test_the_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(3, shown=False) as screen:
        screen.say("hello")
        screen.step(record(1))
        screen.summary(SUMMARY)
    assert capsys.readouterr().out == ""


def test_size_text() -> None:
    assert [size_text(n) for n in (12, 1_500, 2_000_000, 3e9)] == ["12 B", "1.50 kB", "2.00 MB", "3.00 GB"]


# Ranks, plugins, signals


def test_rank_zero_prints_an_error_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.0)
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        ranks.report(ranks.AgreedError("the sentence."))
    assert capsys.readouterr().err == "error: the sentence.\n"


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_segments_can_grow_unless_the_user_says_otherwise(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {} if name is None else {name: "max_split_size_mb:512"}
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], **given})
    ranks.prepare_environment()
    found = {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")}
    assert found == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


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
    with pytest.raises(UserError, match="there is no such file"):
        import_plugin(tmp_path / "absent.py")


# Whole runs


def start(*arguments: str, launcher: int | None = None) -> subprocess.Popen[str]:
    """The command line in a process of its own, under DeepSpeed's launcher where a number of ranks is given."""
    command = [sys.executable, "-m", "toolkit.train"]
    if launcher is not None:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(launcher)]
        command += ["--master_port", str(ranks.free_port()), str(REPOSITORY / "launch" / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [*command, *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_launcher_exits_with_2_and_one_sentence() -> None:
    process = start("--model", "qwen3-tinny", launcher=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "'qwen3-tiny'" in errors[0]


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
    process = start(*arguments, "--set", monitor)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "memory_bytes", "step_time_s", "skipped"} <= set(records[0])
    assert [step for step, record in enumerate(records, 1) if "val_loss" in record] == [2, 4]
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

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for more, status, said in (("none", 2, "already holds a run"), ("auto", 0, "nothing to do")):
        again = start(*arguments, "--resume", more)
        out, err = again.communicate(timeout=120)
        assert (again.returncode, said in out + err) == (status, True), out + err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


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
