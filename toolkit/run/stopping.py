"""How a run stops: a rank asked to stop, a rank that ended without the others, a main thread that is stuck.

Python runs a signal handler between two instructions of the main thread, so never while that waits in C code for a GPU
or for the other ranks. When one rank runs out of memory, the others wait in a collective until DeepSpeed's launcher
kills them, half a minute each, one after the other. So a second thread listens in every rank.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import NoReturn

from toolkit.agreed import AgreedError
from toolkit.errors import UserError
from toolkit.run import leftovers, meeting, ranks

# A rank's exit status, where it is neither 0 nor 1 nor 2, which is for the user's errors.
DIVERGED = 3
INTERRUPTED = 130
# The number of ENOMEM. Not 137, which is how a shell reports what the kernel has killed.
OUT_OF_MEMORY = 12
# The number of ETIMEDOUT.
SILENT = 110
WORDLESS = -1
"""In place of the status of a rank whose connection has closed before it told one."""

BEHIND_SECONDS = 5.0
"""How long a rank has to end by itself when another one has ended, or when the user insists."""
PATIENCE_SECONDS = 15.0
"""How long a rank that is asked to stop has to end its step; three times its longest step, where that is more."""
FIRST_STEP_SECONDS = 600.0
"""The same before its first step has ended, which compiles."""
SILENT_SECONDS = 30.0
"""After how long a rank that gives no sign of life is named."""
STOPPED_SECONDS = 180.0
"""After how long the others end without it."""
_TICK_SECONDS = 1.0
_BEAT_SECONDS = 5.0


class MemoryRanOut(Exception):
    """This rank or another one ran out of memory; memory/rank<n>-out-of-memory.md says why."""


class LeftBehind(Exception):
    """Another rank has ended before this one, which cannot continue without it; `status` is for this one to end with.

    `said`: the status that the other one has told, or WORDLESS. `place`: which process on which machine it was.
    """

    def __init__(self, rank: int, said: int, place: str | None = None) -> None:
        who = f"rank {rank} ({place})" if place is not None else f"rank {rank}"
        how = "without a word: it was killed, or has crashed" if said == WORDLESS else f"with status {said}"
        super().__init__(f"rank {ranks.rank()} ends as well: {who} has ended {how}.")
        self.status = 1 if said == WORDLESS else said


class Heartbeat:
    """A thread that ends this process where its main thread no longer can; a context manager, in the main thread.

    Rank 0 holds a connection to every other rank. A process that ends, however it does, closes its connection; what
    rank 0 then hears it tells the others. Whoever is left has `BEHIND_SECONDS` to end by itself. Over a connection goes
    a line now and then, an empty one as a sign of life: a process that was stopped (SIGSTOP), or whose machine hangs,
    closes nothing.
    """

    def __init__(self) -> None:
        self.orphaned = False
        """Whether DeepSpeed's launcher is gone: nobody would ever end its ranks."""
        self.wakeup, self._signalled = socket.socketpair()
        self._launcher = _launcher()
        self._meeting: meeting.Meeting | None = None  # its store has to live until all are in the process group
        self._peers: meeting.Connections = {}
        self._places: dict[int, str] = {}
        self._heard: dict[int, float] = {}
        self._silent: set[int] = set()
        self._looked = self._beat = time.monotonic()
        self._left: LeftBehind | None = None
        self._left_at = 0.0
        self._known = threading.Event()
        self._asked_at: float | None = None
        self._interrupts = 0
        self._since: float | None = None  # the last step boundary, while steps are made
        self._longest: float | None = None
        self._closed = False

    def __enter__(self) -> Heartbeat:
        global _heartbeat
        _heartbeat = self
        for end in (self.wakeup, self._signalled):
            end.setblocking(False)
        if ranks.world_size() > 1:
            self._connect()
        threading.Thread(target=self._listen, name="heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None or isinstance(value, AgreedError):
            self._close(0)
        elif isinstance(value, UserError):
            self._close(2)
        elif ranks.world_size() == 1:
            self._close(1)
        # The thread stays until `abandon`. Collectives fail when a rank is gone, maybe before that is known here.
        elif not isinstance(value, MemoryRanOut) and self._known.wait(1.0):
            assert self._left is not None
            raise self._left from value

    def step_boundary(self, *, last: bool = False) -> None:
        """A step begins, and the one before it has ended; `last`: no more steps, and no bound on what follows."""
        now = time.monotonic()
        if self._since is not None:
            self._longest = max(self._longest or 0.0, now - self._since)
        self._since = None if last else now

    def tell(self, status: int) -> None:
        """Let the other ranks know that this one ends with `status`; 0: they need not follow."""
        message = f"{ranks.rank()} {status}\n".encode()
        for peer in list(self._peers):
            with contextlib.suppress(OSError):
                peer.sendall(message)

    def _connect(self) -> None:
        """Connect all ranks to rank 0; where that fails, none is watched, which rank 0 says."""
        self._meeting = meeting.Meeting()
        self._peers, self._places, problem = meeting.connect(self._meeting)
        if problem is not None and ranks.rank() == 0:
            print(
                f"note: ranks cannot watch each other ({problem}): if one ends, others may wait for it.",
                file=sys.stderr,
            )
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """In a forked child: a copy of a connection would keep it open after its owner's end."""
        for peer in self._peers:
            peer.close()
        self._peers.clear()

    def _close(self, status: int) -> None:
        self.tell(status)
        self._closed = True

    # ---- the thread ----

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._signalled, selectors.EVENT_READ)
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while not self._closed:
                for key, _ in selector.select(_TICK_SECONDS):
                    if key.fileobj is self._signalled:
                        self._hear_signals()
                    elif isinstance(key.fileobj, socket.socket):
                        self._hear(key.fileobj, selector)
                self._look()
        for end in (self.wakeup, self._signalled, *self._peers):
            end.close()

    def _hear_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._signalled.recv(64):
                self._interrupts += number == signal.SIGINT
                if self._asked_at is None and ranks.rank() == 0:
                    again = "; Ctrl-C again ends it at once, and saves nothing" if number == signal.SIGINT else ""
                    self._say(f"the run stops after this step{again}.")
                if self._asked_at is None or self._interrupts == 2:
                    self._asked_at = time.monotonic()

    def _hear(self, peer: socket.socket, selector: selectors.BaseSelector) -> None:
        """A peer's sign of life, its last words, or its end without any."""
        rank, status = self._peers[peer], WORDLESS
        with contextlib.suppress(OSError, ValueError):
            said = peer.recv(4096)
            if said and not said.strip():
                self._heard[rank] = time.monotonic()
                return
            rank, status = (int(word) for word in said.split())
        selector.unregister(peer)
        del self._peers[peer]
        peer.close()
        if status == 0 or self._left is not None:
            return
        self._left, self._left_at = LeftBehind(rank, status, self._places.get(rank)), time.monotonic()
        self._known.set()
        if ranks.rank() == 0:
            for other in list(self._peers):
                with contextlib.suppress(OSError):
                    other.sendall(f"{rank} {status}\n".encode())

    def _look(self) -> None:
        """End this process if it should have ended."""
        now = time.monotonic()
        self._look_for_silence(now)
        if not self.orphaned and _launcher() != self._launcher:
            self.orphaned = True
            self._asked_at = self._asked_at or now
        if self._left is not None and now > self._left_at + BEHIND_SECONDS:
            self._leave(str(self._left), self._left.status)
        since, asked = self._since, self._asked_at
        if since is not None and asked is not None:
            patience = FIRST_STEP_SECONDS if self._longest is None else max(PATIENCE_SECONDS, 3 * self._longest)
            if self._interrupts > 1:
                patience = BEHIND_SECONDS
            if now > max(since, asked) + patience:
                waited = f"{now - max(since, asked):.0f} s after it was asked to stop"
                self._leave(f"rank {ranks.rank()} ends without a checkpoint, {waited}, in {_place()}.", INTERRUPTED)

    def _look_for_silence(self, now: float) -> None:
        """Give a sign of life, and look for ranks that give none."""
        if now > self._beat + _BEAT_SECONDS:
            self._beat = now
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.sendall(b"\n")
        if now > self._looked + 5 * _TICK_SECONDS:  # this process was stopped itself, and heard nobody
            self._heard.clear()
        self._looked = now
        silent = {rank: now - self._heard.setdefault(rank, now) for rank in self._peers.values()}
        late = [rank for rank, seconds in silent.items() if seconds > SILENT_SECONDS]
        if any(seconds > STOPPED_SECONDS for seconds in silent.values()):
            then = "started again, the run continues from its newest checkpoint"
            self._leave(self._told(f"all ranks end, because {self._who(late, now)}; {then}."), SILENT)
        if new := [rank for rank in late if rank not in self._silent]:
            why = "it was stopped (kill -CONT lets it continue), or its machine or the network hangs"
            ends = f"after {STOPPED_SECONDS:.0f} s without one the run ends"
            self._say(self._told(f"{self._who(new, now)}: {why}; {ends}."))
        for rank in self._silent.difference(late).intersection(silent):
            self._say(self._told(f"rank {rank} ({self._places.get(rank)}) is back."))
        self._silent = set(late)

    def _who(self, late: list[int], now: float) -> str:
        """That these ranks are silent, which are often those of one machine."""
        first, *others = sorted(late)
        more = f" and {len(others)} more" if others else ""
        verb = "have" if others else "has"
        seconds = now - self._heard[first]
        return f"rank {first} ({self._places.get(first)}){more} {verb} given no sign of life for {seconds:.0f} s"

    @staticmethod
    def _told(words: str) -> str:
        """`words` on rank 0, and on one rank of each machine that has lost it; nothing on the others."""
        return words if ranks.rank() in (0, 1) or ranks.local_rank() == 0 else ""

    def _leave(self, words: str, status: int) -> NoReturn:
        self._say(words)
        self.tell(status)
        os._exit(status)

    @staticmethod
    def _say(words: str) -> None:
        # Not by way of sys.stderr, whose lock the main thread may hold.
        with contextlib.suppress(OSError):
            os.write(2, f"note: {words}\n".encode() if words else b"")


_heartbeat: Heartbeat | None = None


def abandon(status: int) -> NoReturn:
    """End this process at once, and tell the other ranks: to leave the process group may hang or fail by now."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _heartbeat is not None:
        _heartbeat.tell(status)
    os._exit(status)


def lost_peer(error: Exception) -> str | None:
    """The sentence for `error` where it is that other ranks can no longer be reached, else None."""
    from torch import distributed

    said = str(error)
    gloo = isinstance(error, RuntimeError) and ("gloo/" in said or "Gloo" in said)
    if ranks.world_size() == 1 or not (gloo or isinstance(error, distributed.DistError)):
        return None
    reason = said.strip().splitlines()[0].rpartition("] ")[2] if said.strip() else type(error).__name__
    cause = leftovers.little_shared_memory() or "one of them has ended, or a machine or the network has failed"
    return f"rank {ranks.rank()} cannot reach the other ranks any more ({reason.rstrip('.')}): {cause}."


def _place() -> str:
    """Where the main thread is."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"


_interrupted = False


@contextlib.contextmanager
def interrupts_remembered() -> Iterator[None]:
    """SIGINT does what it did, and a `StopRequest` that is made later knows of it.

    Python drops a KeyboardInterrupt that is raised in a callback of its own, such as one of its imports', and what a
    script starts in the background ignores SIGINT until a `StopRequest` listens: the run would not stop.
    """
    global _interrupted
    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _interrupted
        _interrupted = True
        if callable(before):
            before(number, frame)

    in_main = threading.current_thread() is threading.main_thread()
    ours = in_main and before in (signal.default_int_handler, signal.SIG_IGN)
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        _interrupted = False
        if ours:
            signal.signal(signal.SIGINT, before)


class StopRequest:
    """Turns the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP into a flag, so that all ranks stop after the same step.

    SIGHUP is what a closed session sends; under nohup, which has it ignored, it stays so. A second SIGINT acts as if
    there were no handler. `requested` holds, too, once DeepSpeed's launcher is gone. The heartbeat ends a rank that is
    asked to stop and reaches no step boundary. Use as a context manager, in the main thread, while steps are made.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._signalled = _interrupted
        self._previous: dict[int, object] = {}
        self._wakeup = -1

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self._signalled or self._heartbeat.orphaned

    def __enter__(self) -> StopRequest:
        # Written to by the signal itself, whatever the main thread is doing.
        self._wakeup = signal.set_wakeup_fd(self._heartbeat.wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        self._heartbeat.step_boundary()
        return self

    def step_boundary(self, *, last: bool = False) -> None:
        """All ranks have ended a step together; `last`: it was the last one."""
        self._heartbeat.step_boundary(last=last)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches a rank twice: from the terminal, then as SIGTERM from the launcher.
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.step_boundary(last=True)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup)


def _launcher() -> tuple[int, ...]:
    """The processes that started this rank, if DeepSpeed's launcher did: one for each machine, and its parent."""
    if "CROSS_RANK" not in os.environ:  # which it sets, and nobody else
        return ()
    import psutil

    parent = os.getppid()
    try:
        return parent, psutil.Process(parent).ppid()
    except psutil.NoSuchProcess:
        return (parent,)
