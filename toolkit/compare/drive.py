"""Makes the runs of a comparison, some at a time, until none is left to make, its time is over or the user stops it."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from toolkit.compare.runs import Cell, Runs
from toolkit.errors import UserError
from toolkit.records.run import RUN
from toolkit.run.stopping import DIVERGED

_USER_ERROR = 2
_WAIT = 0.2
_LAST = 20_000
"""Bytes of a log in which its last error is looked for: a launcher says more after it, whole command lines among it."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process makes runs in `folder` meanwhile. Raises UserError where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another `toolkit compare`, which has not ended.") from None
        yield


class Driver:
    """Starts and watches runs.

    Args:
        runs: of the comparison.
        jobs: runs at a time.
        keep_checkpoints: of runs that have ended.
        say: shows a line.
        ended: called after each run that has ended well.
        minutes: after which it stops as at the user's request; None: never.
    """

    def __init__(
        self,
        runs: Runs,
        *,
        jobs: int,
        keep_checkpoints: bool,
        say: Callable[[str], None],
        ended: Callable[[], object],
        minutes: float | None = None,
    ) -> None:
        self.runs, self.jobs, self.keep_checkpoints = runs, jobs, keep_checkpoints
        self.say, self.ended, self.minutes = say, ended, minutes
        self.failures: dict[str, str] = {}
        """By method, what went wrong."""
        self._active: dict[Cell, tuple[subprocess.Popen[bytes], IO[bytes], float]] = {}
        self._signals = 0
        self._made = 0

    def drive(self) -> bool:
        """Make all runs that are wanted; False where it was stopped before.

        Raises:
            UserError: the first run is refused: what is wrong with it is wrong with all.
        """
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        until = math.inf if self.minutes is None else time.monotonic() + 60 * self.minutes
        try:
            while True:
                if time.monotonic() >= until and not self._signals:
                    self.say(f"{self.minutes:g} minute{'s are' if self.minutes != 1 else ' is'} over.")
                    self._stop()
                wanted = [] if self._signals else self.wanted()
                for cell in wanted[: self.jobs - len(self._active)]:
                    self._start(cell)
                if not self._active:
                    return not self._signals or not self.wanted()
                self._collect()
                time.sleep(_WAIT)
        finally:
            for cell, (process, log, _) in self._active.items():  # of an error here
                self.say(f"stopped: {cell}")
                os.killpg(process.pid, signal.SIGKILL)
                log.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def wanted(self) -> list[Cell]:
        """Runs to start now, sweeps before the seeds that follow them."""
        cells = [
            Cell(method.name, point, seed)
            for method in self.runs.plan.methods
            if method.name not in self.failures
            for point, seed in self.runs.tuning(method).wanted
        ]
        return sorted((cell for cell in cells if cell not in self._active), key=lambda cell: cell.seed)

    def _start(self, cell: Cell) -> None:
        again = self.runs.clear(cell)
        resumed = not again and (self.runs.folder(cell) / RUN).exists()
        self.runs.log(cell).parent.mkdir(parents=True, exist_ok=True)
        log = open(self.runs.log(cell), "ab" if resumed else "wb")  # noqa: SIM115 (open as long as the run lasts)
        process = subprocess.Popen(
            self.runs.command(cell),
            env=self.runs.environment(self.jobs),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
        )
        self._active[cell] = process, log, time.monotonic()
        self.say(f"{'resumed' if resumed else 'started anew' if again else 'started'}: {cell}")

    def _collect(self) -> None:
        for cell, (process, log, began) in list(self._active.items()):
            status = process.poll()
            if status is None:
                continue
            del self._active[cell]
            log.close()
            loss = self.runs.loss(cell)
            if loss is not None and status in (0, DIVERGED):
                self._made += 1
                seconds = time.monotonic() - began
                self.say(f"{cell}: validation loss {loss:.4f}, {seconds:.0f} s")
                if not self.keep_checkpoints:
                    self.runs.remove_checkpoints(cell)
                self.ended()
            elif self._signals:
                kept = self.runs.resumable(cell)
                self.say(f"interrupted: {cell}{'' if kept else ', before its first checkpoint: it will start anew'}")
            else:
                self._failed(cell, status)

    def _failed(self, cell: Cell, status: int) -> None:
        path = self.runs.log(cell)
        said = path.read_bytes()[-_LAST:].decode(errors="replace").splitlines()
        problem = next((line for line in reversed(said) if line.startswith("error: ")), "").removeprefix("error: ")
        what = problem or f"it ended with status {status}; its output is in {path}."
        if status == _USER_ERROR and not self._made and not self._anything():
            raise UserError(f"{cell}: {what}")
        self.failures[cell.method] = f"{cell}: {what}"
        self.say(f"failed: {cell}: {what}")

    def _anything(self) -> bool:
        """Whether any run of the comparison has ended."""
        plan = self.runs.plan
        return any(self.runs.losses(method.name, self.runs.tuning(method).point) for method in plan.methods)

    def _stop(self, number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
        self._signals += 1
        if self._signals == 1:
            self.say("stopping: runs finish their step and save a checkpoint; Ctrl-C now ends them at once.")
        for process, _, _ in self._active.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT if self._signals < 3 else signal.SIGKILL)
