"""Stopping: signals, and processes that wait in C when another one ends or when they are asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from toolkit.run import ranks, stopping
from toolkit.run.stopping import StopRequest, Watch

WORKER = """
import ctypes, os, signal, sys, time
from torch import distributed
from toolkit.run import stopping
from toolkit.run.stopping import StopRequest, Watch, abandon

def wait_forever():  # in C: no signal ends it
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

rank, ends = int(os.environ["RANK"]), int(sys.argv[2])
stopping.BEHIND_SECONDS = stopping.PATIENCE_SECONDS = 1.0
distributed.init_process_group("gloo")
if sys.argv[1] == "unreachable":
    stopping.CONNECT_SECONDS = 1.0
    os.environ["MASTER_ADDR"] = "203.0.113.1"  # kept for documents: nobody has it
with Watch() as watch, StopRequest(watch) as stop:
    distributed.barrier()
    print("ready", flush=True)
    {
        "abandon": lambda: abandon(12) if rank == ends else wait_forever(),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == ends else wait_forever(),
        "finish": lambda: None if rank == ends else time.sleep(stopping.BEHIND_SECONDS + 2),
        "fail": lambda: 1 / 0 if rank == ends else distributed.barrier(),
        "stop": lambda: (stop.border(), wait_forever()),
        "insist": wait_forever,
        "unreachable": distributed.barrier,
    }[sys.argv[1]]()
os._exit(0)
"""


def start(what: str, ends: int = 0, world_size: int = 1) -> list[subprocess.Popen[str]]:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port()), "WORLD_SIZE": str(world_size)}
    made = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, what, str(ends)],
            env=os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
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
    ],
)
def test_ranks_that_wait_in_c_end_with_another_one(what: str, ends: int, statuses: list[int]) -> None:
    processes = start(what, ends, len(statuses))
    found, errors = ended(processes, within=8.0)
    assert found == statuses, errors
    status = 12 if what == "abandon" else 1
    for rank, error in enumerate(errors):
        said = f"note: rank {rank} ends as well: rank {ends} has ended with status {status}.\n"
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
    assert "ZeroDivisionError" in failed and "LeftBehind: rank 0 ends as well: rank 1 has ended" in left


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
    with Watch() as watch, StopRequest(watch) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_other_signals_ask_as_well(number: int) -> None:
    with Watch() as watch, StopRequest(watch) as stop:
        os.kill(os.getpid(), number)
        assert stop.requested


def test_a_rank_without_launcher_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def requested_after_its_parent_is_gone() -> bool:
        with monkeypatch.context() as patch, Watch() as watch, StopRequest(watch) as stop:
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
