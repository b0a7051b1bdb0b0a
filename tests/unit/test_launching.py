"""`toolkit train`: what it takes, refuses and passes on; `tests/distributed/test_after_training.py` starts ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import run

from toolkit.errors import UserError
from toolkit.run import launching
from toolkit.run.settings import line_of, parse

LINE = (
    "--model m --tokenizer t --data d --data-subset s --text-column body --bad-documents stop --val-data v "
    "--config soam_zero3 --set a=1 --set b={} --plugin p.py --steps 7 --seq-len 33 --micro-batch 2 --lr 1e-3 "
    "--warmup 0.2 --seed 0 --eval-every 100 --run-dir r --activations full --loss plain --from-checkpoint "
    "--resume --convert-state --deterministic"
)


@pytest.mark.parametrize("line", ["", LINE, "--activations checkpoint:2,tiled --resume none", "--data=-x --set c=-1"])
def test_ranks_get_the_settings_as_they_were_typed(line: str) -> None:
    settings = parse(line.split())
    assert settings is not None
    again = parse(line_of(settings.model_dump(include=settings.model_fields_set)))
    assert again == settings
    assert again is not None and again.model_fields_set == settings.model_fields_set


def test_help_has_all_options_of_a_run_and_the_launchers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "train", "--help") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    of_a_run, of_the_launcher = shown.split("Ranks and machines")
    assert all(option in of_a_run for option in LINE.split() if option.startswith("--"))
    launcher = ("--ranks", "--hostfile", "--nodes", "--include", "--exclude", "--no-ssh")
    for option in (*launcher, "--node-rank", "--master-addr", "--master-port", "--launcher", "--restarts"):
        assert option in of_the_launcher and option not in of_a_run


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--hostfile absent", "--hostfile absent: there is no such file."),
        ("--launcher pdhs", "must be one of pdsh, mpich, impi. Did you mean 'pdsh'?"),
        ("--include localhost:0 --exclude localhost:1", "--include and --exclude both say which ranks there are"),
        ("--ranks 2 --include localhost:0", "--include and --ranks both say"),
        ("--node_rank 1", "--no-ssh and --node-rank, this machine's place in the hostfile, go together."),
        ("--no_ssh --node_rank 1", "--no-ssh needs --master-addr, the address of the first machine"),
        ("--num_nodes 2", "--nodes is for several machines: name them with --hostfile"),
        ("--master_addr 10.0.0.1", "--master-addr is for several machines"),
        ("--include worker-0", "--include names 'worker-0', but without --hostfile there is only localhost."),
        ("--batch-size 2", "Use --micro-batch"),
        ("--ranks 0", "but must be at least 1."),
        ("--model qwen3-tny", "Did you mean 'qwen3-tiny'?"),
        ("--config amcs_zero22", "Did you mean 'amcs_zero2'?"),
        ("--data absent.jsonl", "there is no data file or folder 'absent.jsonl'."),
        ("--val-data fineweeb", "Did you mean 'fineweb'?"),
        ("--set train_batch_size=four", 'amcs_zero2: train_batch_size is "four", but must be a valid integer.'),
        ("--set gradient_clippin=1", "Did you mean 'gradient_clipping'?"),
        ("--set a", "write it as section.key=value."),
        ("--steps 0", "--steps is 0, but must be above 0."),
        ("--model ''", "--model is empty"),
    ],
)
def test_what_is_typed_wrong_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "HOSTFILE", tmp_path / "none")
    assert run(monkeypatch, "train", *(word.strip("'") for word in line.split())) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert printed.out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("hosts", "line", "words"),
    [
        ("worker-0 slots=0\nworker-1 slots=2\n", "", "line 1: worker-0 has no ranks; put a # before the line"),
        ("worker-0 slots=2\n\nworker-0 slots=2\n", "", "line 3: worker-0 has a line already"),
        ("worker-0 slot=2\n", "", "line 1: must be a machine and its ranks, as in worker-0 slots=8."),
        ("worker-0 slots=2x\n", "", "line 1: must be a machine and its ranks"),
        ("-oProxyCommand=x slots=1\n", "", "line 1: must be a machine and its ranks"),
        ("", "", "names no machine"),
        (None, "--node-rank 2", "--node-rank is 2, but must be 0 to 1, its place in --hostfile"),
        (None, "--nodes 1 --node-rank 1", "--node-rank is 1, but must be 0 to 0"),
        (None, "--nodes 5", "--nodes is 5, but --hostfile hosts names 2."),
        (None, "--include worker-0@wroker-1:0", "has no such machine. Did you mean 'worker-1'?"),
        (None, "--exclude other", "--exclude names 'other', but --hostfile hosts has no such machine."),
    ],
)
def test_machines_that_are_wrong_start_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    hosts: str | None,
    line: str,
    words: str,
) -> None:
    """DeepSpeed's launcher would start nothing for a machine without ranks, and end with status 0."""
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("worker-0 slots=8\nworker-1 slots=8 max_slots=8 # mine\n" if hosts is None else hosts)
    monkeypatch.setattr(launching, "_pass_on", lambda *_: pytest.fail("it was started"))
    place = [] if "--node-rank" in line else ["--node-rank", "0"]
    given = ["--hostfile", "hosts", "--no-ssh", "--master-addr", "a", *place, *line.split()]
    assert run(monkeypatch, "train", *given) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_a_hostfile_of_several_machines_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb slots=8\n")
    started: list[list[str]] = []
    monkeypatch.setattr(launching, "_pass_on", lambda command, environment: started.append(list(command)) or (7, False))
    line = f"--hostfile {hosts} --no_ssh --node_rank 0 --steps 3 --master_addr a"
    assert run(monkeypatch, "train", *line.split()) == 7
    launcher = {"--hostfile=" + str(hosts), "--no_ssh", "--node_rank=0", "--master_addr=a"}
    assert (
        started[0][4] == "runner"
        and set(started[0][5:-3]) == launcher
        and started[0][-3:] == ["--module", "toolkit.train", "--steps=3"]
    )
    launching.check({"hostfile": hosts, "no_ssh": True, "node_rank": 0, "master_addr": "a", "num_nodes": 2})
    with pytest.raises(UserError, match="go together"):
        launching.check({"hostfile": hosts, "no_ssh": True})


@pytest.mark.parametrize(
    "line",
    [
        "train --ranks 3000000",
        "doctor --ranks 3000000",
        "bench train --ranks 3000000",
        "bench save --ranks 3000000",
        "compare --methods amcs,adamw --out compared --ranks 2 --jobs 3000000",
    ],
)
def test_ranks_for_which_this_machine_has_no_room_are_not_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *line.split()) == 2
    assert "000,000 ranks of this machine take " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_this_machine_need_no_runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(launching, "HOSTFILE", tmp_path / "none")
    monkeypatch.setattr(launching, "_pass_on", lambda command, environment: started.append(list(command)) or (0, False))
    monkeypatch.setattr(launching, "_devices", lambda: 4)
    for line in ("--ranks 2 --master_port 1234 --steps 3", "--steps 3", "--include localhost:1,2 --steps 3"):
        assert run(monkeypatch, "train", *line.split()) == 0
    assert started[0][4:] == ["2", "--master_port=1234", "--module", "toolkit.train", "--steps=3"]
    assert started[1][4] == "4" and started[1][5].startswith("--master_port=")
    assert started[2][4] == "runner" and "--include=localhost:1,2" in started[2]


def test_ranks_take_the_devices_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    monkeypatch.setattr(real_accelerator, "ds_accelerator", CUDA_Accelerator())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launching._numbers(2) == [0, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7a,2")
    assert launching._numbers(2) == ["5", "GPU-7a"]
    with pytest.raises(ValueError, match="4 ranks were asked for, but this machine shows 3 GPUs"):
        launching._numbers(4)


def test_a_torch_for_cpus_is_told_without_its_import() -> None:
    built_for_none = launching._torch_knows_none()
    kinds = [getattr(torch.version, kind, None) for kind in ("cuda", "hip", "xpu")]
    assert built_for_none == (kinds == [None] * 3)
    assert not built_for_none or not torch.accelerator.is_available()
    script = (
        "import sys; from toolkit.run import launching; import toolkit.cli\n"
        "launching._torch_knows_none(); assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
