"""Stopping: signals, and processes that wait in C when another one ends or when they are asked to stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
import weakref
from typing import Any

import pytest

from toolkit.run import ranks, stopping
from toolkit.run.stopping import Heartbeat, StopRequest

WORKER = """
import ctypes, os, signal, sys, time
from torch import distributed
from toolkit.run import meeting, stopping
from toolkit.run.stopping import Heartbeat, StopRequest, abandon

def refused(*address, **how):
    raise ConnectionRefusedError("no way")

def wait_forever():  # in C: no signal ends it
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

rank, ends = int(os.environ["RANK"]), int(sys.argv[2])
stopping.BEHIND_SECONDS = stopping.PATIENCE_SECONDS = 1.0
if sys.argv[1] == "wait":
    stopping.SILENT_SECONDS, stopping.STOPPED_SECONDS, stopping._BEAT_SECONDS = 2.0, 5.0, 0.5
distributed.init_process_group("gloo")
if sys.argv[1] == "unreachable":
    meeting.CONNECT_SECONDS = 1.0
    meeting.socket.create_connection = refused
with Heartbeat() as heartbeat, StopRequest(heartbeat) as stop:
    distributed.barrier()
    print("ready", flush=True)
    {
        "abandon": lambda: abandon(12) if rank == ends else wait_forever(),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == ends else wait_forever(),
        "finish": lambda: None if rank == ends else time.sleep(stopping.BEHIND_SECONDS + 2),
        "fail": lambda: 1 / 0 if rank == ends else distributed.barrier(),
        "stop": lambda: (stop.step_boundary(), wait_forever()),
        "insist": wait_forever,
        "wait": wait_forever,
        "unreachable": distributed.barrier,
    }[sys.argv[1]]()
os._exit(0)
"""


def start(what: str, ends: int = 0, world_size: int = 1) -> list[subprocess.Popen[str]]:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port()), "WORLD_SIZE": str(world_size)}
    made = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, what, str(ends)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    for process in made:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return made


def ended(processes: list[subprocess.Popen[str]], within: float) -> tuple[list[int], list[str]]:
    """Statuses and what was written to stderr, of processes that must end by themselves."""
    deadline = time.monotonic() + within
    try:
        errors = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


@pytest.mark.parametrize(
    ("what", "ends", "statuses"),
    [
        ("abandon", 1, [12, 12, 12]),
        ("kill", 0, [-signal.SIGKILL, 1]),
        ("kill", 1, [1, -signal.SIGKILL, 1]),
    ],
)
def test_ranks_that_wait_in_c_end_with_another_one(what: str, ends: int, statuses: list[int]) -> None:
    processes = start(what, ends, len(statuses))
    found, errors = ended(processes, within=8.0)
    assert found == statuses, errors
    how = "with status 12" if what == "abandon" else "without a word: it was killed, or has crashed"
    for rank, error in enumerate(errors):
        known = f" (process {processes[ends].pid} on {socket.gethostname()})" if 0 in (rank, ends) else ""
        said = f"note: rank {rank} ends as well: rank {ends}{known} has ended {how}.\n"
        assert (said in error) == (rank != ends), error


def test_a_rank_that_has_finished_ends_nobody() -> None:
    found, errors = ended(start("finish", 0, 2), within=20.0)
    assert found == [0, 0], errors


def test_ranks_that_cannot_reach_one_another_train_unwatched() -> None:
    found, [first, second] = ended(start("unreachable", world_size=2), within=20.0)
    assert found == [0, 0]
    assert "note: ranks cannot watch each other (rank " in first and "note" not in second


def test_a_collective_that_fails_is_put_down_to_the_rank_that_ended() -> None:
    found, [left, failed] = ended(start("fail", 1, 2), within=20.0)
    assert found == [1, 1]
    assert "ZeroDivisionError" in failed and "LeftBehind: rank 0 ends as well: rank 1 (process " in left


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_is_named_and_ends_the_others_unless_it_comes_back(stopped: int) -> None:
    processes = start("wait", world_size=3)
    try:
        for pause in (3.5, 0.0):
            processes[stopped].send_signal(signal.SIGSTOP)
            time.sleep(pause)
            if pause:
                assert all(process.poll() is None for process in processes)
                processes[stopped].send_signal(signal.SIGCONT)
                time.sleep(3.0)
        others = [process for rank, process in enumerate(processes) if rank != stopped]
        found, errors = ended(others, within=15.0)
        assert found == [110, 110], errors
        name = f"rank {stopped} (process {processes[stopped].pid} on "
        words = [
            f"{name}",
            "has given no sign of life for 2 s",
            f"is back.\nnote: {name}",
            f"all ranks end, because {name}",
        ]
        assert all(word in errors[0] for word in words[1:2]) and all(name in errors[0] for _ in words[:1]), errors
        assert errors[0].count("no sign of life") == 3 and errors[0].count("is back") == 1, errors
        assert errors[0].index("is back") < errors[0].index("all ranks end, because " + name)
        assert "no sign of life" not in errors[1]
        processes[stopped].send_signal(signal.SIGCONT)
        assert processes[stopped].wait(timeout=15) in (1, 110)
    finally:
        for process in processes:
            process.kill()


def test_a_rank_that_is_asked_to_stop_and_waits_in_c_ends() -> None:
    [process] = start("stop")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    found, [error] = ended([process], within=10.0)
    assert found == [130] and time.monotonic() - began >= 1.0
    assert "rank 0 ends without a checkpoint" in error and "in wait_forever" in error


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_what_waits_in_c() -> None:
    [process] = start("insist")
    process.send_signal(signal.SIGINT)
    time.sleep(2.0)  # its first step may take long
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    found, _ = ended([process], within=6.0)
    assert found == [130]


def test_first_signal_asks_and_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Heartbeat() as heartbeat, StopRequest(heartbeat) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_an_interrupt_that_python_drops_is_not_lost(handler: Any) -> None:
    """As in one of its own callbacks while it imports, or as a script's background process does."""

    class Gone:
        pass

    before = signal.signal(signal.SIGINT, handler)
    with stopping.interrupts_remembered():
        gone = Gone()
        dropped = weakref.ref(gone, lambda _: os.kill(os.getpid(), signal.SIGINT))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pytest.PytestUnraisableExceptionWarning)
            del gone
            with Heartbeat() as heartbeat, StopRequest(heartbeat) as stop:
                assert dropped() is None and stop.requested
    with Heartbeat() as heartbeat, StopRequest(heartbeat) as stop:
        assert not stop.requested
    assert signal.signal(signal.SIGINT, before) is handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_other_signals_ask_as_well(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # these tests may run under nohup
    with Heartbeat() as heartbeat, StopRequest(heartbeat) as stop:
        os.kill(os.getpid(), number)
        assert stop.requested


def test_a_run_under_nohup_outlives_its_session() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Heartbeat() as heartbeat, StopRequest(heartbeat) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_of_a_lost_connection_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import distributed

    gloo = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2000"
    )
    assert stopping.lost_peer(gloo) is None, "there is no other rank"
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = stopping.lost_peer(gloo)
    assert said is not None and "(Connection closed by peer [127.0.0.1]:2000): one of them has ended" in said
    assert stopping.lost_peer(distributed.DistBackendError("NCCL error\nmore")) is not None
    full = os.statvfs_result((4096, 4096, 16, 0, 0, 0, 0, 0, 0, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: full)
        said = stopping.lost_peer(gloo)
        assert said is not None and said.endswith(": /dev/shm has 0.0 MB free.")
    assert stopping.lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_rank_without_launcher_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def requested_after_its_parent_is_gone() -> bool:
        with monkeypatch.context() as patch, Heartbeat() as heartbeat, StopRequest(heartbeat) as stop:
            assert not stop.requested
            patch.setattr(os, "getppid", lambda: 1)  # as for a process whose parent has gone
            deadline = time.monotonic() + 2 * stopping._TICK_SECONDS
            while not stop.requested and time.monotonic() < deadline:
                time.sleep(0.01)
            return stop.requested

    monkeypatch.setenv("CROSS_RANK", "0")
    assert requested_after_its_parent_is_gone()
    monkeypatch.delenv("CROSS_RANK")
    assert not requested_after_its_parent_is_gone()  # started by hand: parents may come and go
