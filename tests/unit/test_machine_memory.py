"""Memory of the machine, and of the control group that a container gives a part of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from toolkit.errors import UserError
from toolkit.memory import machine
from toolkit.run import ranks

GB = 10**9


def written(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_a_control_group_and_those_above_it(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "0::/pod/task\n",
        f"{top}/pod/task/memory.max": "max\n",
        f"{top}/pod/memory.max": f"{8 * GB}\n",
        f"{top}/pod/memory.current": f"{3 * GB}\n",
        f"{top}/pod/memory.stat": f"anon 5\ninactive_file {GB}\n",
    }
    assert machine.control_groups(written(tmp_path, **files)) == [(8 * GB, 2 * GB)]


def test_the_older_control_groups(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "3:cpu,cpuacct:/job\n2:memory:/job\n",
        f"{top}/job/memory.limit_in_bytes": f"{4 * GB}",
        f"{top}/job/memory.usage_in_bytes": "unreadable",
        f"{top}/memory.limit_in_bytes": f"{9 * GB}",
    }
    assert machine.control_groups(written(tmp_path, **files)) == [(4 * GB, 0), (9 * GB, 0)]
    assert machine.control_groups(tmp_path / "elsewhere") == []


def test_ranks_are_refused_by_what_the_control_group_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "control_groups", lambda: [(100 * GB, GB), (3 * GB, 2 * GB)])
    assert machine.unused() == GB
    ranks.check_room(1)
    ranks.check_room(2)
    with pytest.raises(UserError, match=r"--ranks: 4 ranks .* and 1\.00 GB of its memory are free, enough for 2\."):
        ranks.check_room(4)
    monkeypatch.setattr(machine, "control_groups", lambda: [])
    assert machine.unused() == pytest.approx(psutil.virtual_memory().available, abs=GB)


def test_asking_loads_no_torch() -> None:
    code = "import sys; from toolkit.run import ranks; ranks.check_room(2); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
