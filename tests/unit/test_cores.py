"""How the cores of a machine, or of its control group, are shared out as threads of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.records import machine
from toolkit.run import ranks


def threads(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a rank with this environment has in OMP_NUM_THREADS."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], **environment})
    ranks.prepare_environment()
    return os.environ["OMP_NUM_THREADS"]


@pytest.fixture
def _nine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nine cores, and no control group."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.setattr(machine, "ROOT", tmp_path)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}


@pytest.mark.usefixtures("_nine")
@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({}, "9"),
        ({"LOCAL_SIZE": "2"}, "4"),
        ({"LOCAL_WORLD_SIZE": "4"}, "2"),
        ({"LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "4"),
        ({"LOCAL_SIZE": "20"}, "1"),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}, "1"),
        ({"LOCAL_WORLD_SIZE": "2", **TORCHRUN}, "4"),
        ({"LOCAL_WORLD_SIZE": "1", **TORCHRUN}, "1"),  # torchrun would not have set it
        ({"LOCAL_WORLD_SIZE": "2", **TORCHRUN, "OMP_NUM_THREADS": "3"}, "3"),
        ({"LOCAL_WORLD_SIZE": "2", **TORCHRUN, "LEANSTATE_THREADS": "1"}, "1"),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "3", "LEANSTATE_THREADS": "7"}, "7"),
    ],
)
def test_cores_are_shared_among_the_ranks_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], want: str
) -> None:
    assert threads(monkeypatch, **environment) == want


V1 = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 9),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "2000000 100000\n"}, 9),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "5000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense"}, 9),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100 0"}, 9),
        ({"proc/self/cgroup": "\nnonsense\n0:\n0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "0::/pod/task\n",
                "sys/fs/cgroup/pod/task/cpu.max": "max 100000",
                "sys/fs/cgroup/pod/cpu.max": "300000 100000",
            },
            3,
        ),
        (
            {  # as a container has it, which finds its own group at the top
                "proc/self/cgroup": "4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n",
                f"{V1}/cpu.cfs_quota_us": "250000\n",
                f"{V1}/cpu.cfs_period_us": "50000\n",
                "sys/fs/cgroup/memory/cpu.cfs_quota_us": "100000\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/job\n",
                f"{V1}/job/cpu.cfs_quota_us": "-1\n",
                f"{V1}/job/cpu.cfs_period_us": "100000\n",
            },
            9,
        ),
        ({}, 9),
    ],
)
@pytest.mark.usefixtures("_nine")
def test_a_quota_of_a_control_group_counts(tmp_path: Path, files: dict[str, str], want: int) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine.cores() == want


@pytest.mark.usefixtures("_nine")
def test_ranks_share_a_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("400000 100000")
    assert threads(monkeypatch, LOCAL_SIZE="2") == "2"


@pytest.mark.parametrize("given", ["0", "two", "-1", "1.5", ""])
def test_a_wrong_number_of_threads_is_one_sentence(given: str) -> None:
    command = [sys.executable, "-m", "toolkit.train", "--steps", "1"]
    environment: dict[str, Any] = os.environ | {"LEANSTATE_THREADS": given}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: LEANSTATE_THREADS is {given!r}, but must be a whole number from 1: threads of each rank.\n"
    )
