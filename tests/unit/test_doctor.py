"""`toolkit doctor`: what it finds here, and that it names what will not work."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.commands import doctor as doctor_command
from toolkit.commands.doctor import Findings, examine
from toolkit.errors import UserError
from toolkit.records.machine import cores
from toolkit.run import hosts, leftovers
from toolkit.run.folder import versions

REPOSITORY = Path(__file__).resolve().parents[2]

SCRIPT = "import sys; from toolkit.cli import main; sys.argv[0] = 'toolkit'; main()"


def doctor(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, "doctor", *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def found(*options: str, **environment: str) -> tuple[int, dict[str, Any]]:
    done = doctor("--json", *options, **environment)
    return done.returncode, json.loads(done.stdout)


def test_it_says_what_this_machine_has(tmp_path: Path) -> None:
    status, told = found(TORCH_EXTENSIONS_DIR=str(tmp_path))
    facts = told["facts"]
    assert (status, told["problems"]) == (0, [])
    assert f"deepspeed {metadata.version('deepspeed')}" in facts["versions"]
    assert facts["CPU"] == f"{cores()} cores, {torch.backends.cpu.get_cpu_capability()}"
    assert len(facts["GPUs"]) == torch.cuda.device_count()
    assert facts["DeepSpeed fits"] == "yes" and facts["build locks"] == []


def test_what_will_not_work_is_a_sentence_and_status_1(tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    done = doctor(CXX="/nowhere/g++", LEANSTATE_CPU_MATMUL="fp33", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    problems = [line for line in lines if line.startswith("problem: ")]
    assert len(problems) == 2 and "Traceback" not in done.stderr
    assert problems[0].startswith("problem: LEANSTATE_CPU_MATMUL is 'fp33', but must be one of auto, native, fp32.")
    assert problems[1].startswith("problem: there is no C++ compiler") and "CXX" in problems[1]
    assert next(line for line in lines if line.startswith("build locks")).endswith(str(lock)), "and nothing is removed"
    assert lock.exists()


def test_a_deepspeed_that_lacks_a_method_and_a_full_shared_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for name in list(os.environ):  # what `examine` sets in this process is taken back
        monkeypatch.setenv(name, os.environ[name])
    tokenizers = ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    for name in ("OMP_NUM_THREADS", "HF_DATASETS_DISABLE_PROGRESS_BARS", *tokenizers, "DS_ACCELERATOR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", ""))
    monkeypatch.delattr(DeepSpeedZeroOptimizer, "setup_buckets")
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 16, 1, 1, 0, 0, 0, 0, 255)))
    told = examine()
    assert told.facts["DeepSpeed fits"] == "no" and told.facts["/dev/shm"] == "65.54 kB, 4.10 kB free"
    shared, fits = told.problems
    assert shared == "/dev/shm has 0.0 MB free: ranks of one machine may fail to reach one another."
    assert fits == "this DeepSpeed lacks what leanstate relies on: DeepSpeedZeroOptimizer.setup_buckets."


def test_what_killed_runs_left_in_shared_memory_is_named_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    names = (
        "nccl-left",
        "torch_left",
        "deepspeed_left",
        "nccl-mapped",
        "nccl-open",
        "nccl-young",
        "of_others",
    )
    for name in names:
        (tmp_path / name).write_bytes(bytes(4096))
        if name != "nccl-young":
            os.utime(tmp_path / name, (0, 0))
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    left = [tmp_path / name for name in ("deepspeed_left", "nccl-left", "torch_left")]
    with open(tmp_path / "nccl-mapped", "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096)
    with open(tmp_path / "nccl-open"), mapped:
        assert leftovers.left_in_shared_memory() == left
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(doctor_command, "examine", lambda: Findings({"left by killed runs": list(map(str, left))}))
            doctor_command.doctor()
        assert "toolkit doctor --fix removes what killed runs left\n" in capsys.readouterr().out
        assert leftovers.removed() == [lock, *left]
        assert leftovers.removed() == []
    assert sorted(path.name for path in tmp_path.glob("*_*")) == ["of_others"]
    assert sorted(path.name for path in tmp_path.glob("nccl-*")) == ["nccl-mapped", "nccl-open", "nccl-young"]


SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
case $1 in
  unreachable) echo "ssh: connect to host unreachable port 22: No route to host" >&2; exit 255;;
  late) shift; PYTHONPATH=%s sh -c "$*";;
  *) shift; sh -c "$*";;
esac
"""


def test_machines_of_a_hostfile_are_asked_for_their_clocks_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    # A machine whose clock is late, and that has another transformers.
    (other / "sitecustomize.py").write_text(
        "import time\nfrom importlib import metadata\nnow, version = time.time, metadata.version\n"
        "time.time = lambda: now() - 30\n"
        "metadata.version = lambda name: '4.0.0' if name == 'transformers' else version(name)\n"
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ssh").write_text(SSH % f"{other}:{REPOSITORY}")
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# mine\nsame slots=2\n\nlate slots=8\nunreachable slots=8\n")
    same, late, unreachable = hosts.ask(hosts.read_hostfile(hostfile))
    assert abs(same.ahead_seconds) < 1.0 and same.versions == versions()
    assert late.ahead_seconds == pytest.approx(-30.0, abs=1.0)
    installed, clock, silent = hosts.problems([same, late, unreachable], versions())
    assert clock.startswith("the clock of late is 30.") and "behind this machine's" in clock
    here = metadata.version("transformers")
    assert installed == f"late has transformers 4.0.0 (here {here}): install the same on all machines."
    assert silent.startswith("unreachable does not answer by ssh (ssh: connect to host unreachable port 22: No route")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=2\nb\n", "line 2: must be a machine and its ranks, as in worker-0 slots=8."),
        ("-oProxyCommand=x slots=1\n", "line 1: must be a machine and its ranks, as in worker-0 slots=8."),
        ("# nobody\n", "names no machine; write one a line, as in worker-0 slots=8."),
        (None, ": No such file or directory."),
    ],
)
def test_a_hostfile_that_is_wrong_is_one_sentence(text: str | None, said: str, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_text(text)
    with pytest.raises(UserError) as raised:
        hosts.read_hostfile(hostfile)
    assert str(raised.value).startswith(f"--hostfile {hostfile}") and str(raised.value).endswith(said)
