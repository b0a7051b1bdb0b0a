"""What killed processes leave: torch's lock of a build, DeepSpeed's shared buffers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from toolkit.run import leftovers, ranks

OWNER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam" / "lock"


@pytest.fixture
def owner(lock: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_build_does_not_wait_for_a_killed_owner(
    lock: Path, owner: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert not FileBaton(str(lock)).try_acquire()
    leftovers.release_locks()
    waiting = threading.Thread(target=FileBaton(str(lock)).wait, daemon=True)
    waiting.start()
    waiting.join(timeout=20)
    assert not waiting.is_alive()
    said = capsys.readouterr().err
    assert f"note: removed {lock}, left by a process that was killed while it built cpu_adam." in said


def test_a_lock_stays_while_its_owner_or_a_compiler_lives(
    lock: Path, owner: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leftovers._held(lock) == owner.pid
    monkeypatch.setattr(leftovers, "TOLD_SECONDS", 0.2)
    releasing = threading.Thread(target=leftovers._release, args=([lock], 0.05))
    releasing.start()
    releasing.join(timeout=1.0)
    assert lock.exists() and releasing.is_alive()
    assert (
        f"note: process {owner.pid} holds {lock}: a start that needs cpu_adam waits for it." in capsys.readouterr().err
    )
    compiler = subprocess.Popen(["sleep", "600"], cwd=lock.parent)
    owner.kill()
    owner.wait()
    releasing.join(timeout=1.0)
    assert lock.exists() and releasing.is_alive()
    compiler.kill()
    compiler.wait()
    releasing.join(timeout=20)
    assert not lock.exists()


def test_locks_that_another_machine_may_hold_stay(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import psutil

    lock.touch()
    for kind, local in (("nfs4", False), ("fuse.sshfs", False), ("ext4", True)):
        part = type("Part", (), {"mountpoint": str(lock.parent.parent.resolve()), "fstype": kind})
        monkeypatch.setattr(psutil, "disk_partitions", lambda all, part=part: [part])
        leftovers._release([lock], 0.01)
        assert lock.exists() != local
        assert f"{lock} may be another user's or machine's" in capsys.readouterr().err or local


def test_each_environment_builds_in_its_own_folder(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(prefix: str) -> Path:
        monkeypatch.setattr(sys, "prefix", prefix)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parent.parent))
        leftovers.own_build_folder()
        leftovers.own_build_folder()  # a process that another one started
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])

    first, second = folder("/one"), folder("/two")
    assert first != second and first == folder("/one")
    assert first.parent == second.parent == lock.parent.parent
    # Locks of either place are looked after.
    lock.touch()
    (first / "cpu_adam").mkdir(parents=True)
    (first / "cpu_adam" / "lock").touch()
    assert set(leftovers.find_locks()) == {lock, first / "cpu_adam" / "lock"}


RUN = "from toolkit.run import ranks; ranks.prepare_environment(); ranks.start()"
OWN_LOOP = "import toolkit, deepspeed; toolkit.register(); deepspeed.init_distributed(auto_mpi_discovery=False)"


@pytest.mark.parametrize("start", [RUN, OWN_LOOP])
def test_ranks_leave_no_shared_buffers(start: str) -> None:
    """The extension that makes them is for inference and is not built; DeepSpeed's reduction works without."""
    script = f"""
import os, torch
{start}
from deepspeed import comm
x = torch.full((1000,), 3.0)
comm.inference_all_reduce(x)
assert (x == 3.0).all()
print(os.environ["MASTER_PORT"], flush=True)
os.kill(os.getpid(), 9)
"""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(ranks.free_port())
    environment = {**os.environ, **alone, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{run.stdout.split()[-1]}_*"))
