"""`toolkit doctor`: what it finds here, and that it names what will not work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.commands.doctor import examine

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
    assert facts["CPU"] == f"{len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}"
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
    for name in ("OMP_NUM_THREADS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM", "DS_ACCELERATOR"):
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
