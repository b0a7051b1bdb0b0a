"""Processes of Python that begin with everything imported.

Importing PyTorch, DeepSpeed and transformers takes a rank 5 to 15 seconds of processor time, most cases of the tests
less than one; under the `deepspeed` launcher it is imported twice more, before the first rank begins. So one process
imports it all and forks: ranks by themselves, or a launcher, whose calls of `subprocess.Popen` on this Python fork in
turn. They are real processes, with the parents, groups, environments and ends that they would have; only their command
lines, which remain the server's, differ. What starts from nothing is tested where tests start it.

As a script it is the server: it takes what to start as a line of JSON (`Order`) and answers with its process number;
when it has ended, with a line of its number and exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import psutil

IMPORTS = (
    "torch._inductor.compile_fx",
    "torch._inductor.codegen.memory_planning",
    "torch._inductor.select_algorithm",
    "torch._inductor.standalone_compile",
    "torch._functorch._aot_autograd.aot_autograd_result",
    "torch.fx.experimental.proxy_tensor",
    "torch._export",
    "deepspeed",
    "transformers.models.qwen3.modeling_qwen3",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "toolkit.train",
    "toolkit.run.training",
    "toolkit.zero.engine",
    "toolkit.estimate.predict",
)
GRACE = 20.0
"""Seconds that other ranks have when one has failed."""
PATIENCE = 300.0
"""Seconds in which the server must begin, for which it imports everything, and answer."""


class Order(TypedDict):
    """`command`: a command line of this Python. `output`: a file for stdout and stderr, or None for the parent's.

    `launches`: what it starts of this Python is forked, too. `session`: it gets one of its own. `ignored`: numbers of
    signals.
    """

    command: list[str]
    environment: dict[str, str]
    output: str | None
    launches: bool
    session: bool
    ignored: list[int]


class Forked:
    """A process of the server, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.status(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float = 600.0) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = self._server.status(self.pid, 0.2)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """And all that it has started: a launcher that is killed leaves its ranks behind."""
        if self.poll() is None:
            _kill_all(self.pid)


def _kill_all(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


class ForkServer:
    """The process that forks what this process's tests start; it begins when first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""
        self._ended: dict[int, int] = {}

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: Path,
        *,
        launches: bool = False,
        session: bool = False,
        ignored: Sequence[int] = (),
    ) -> Forked:
        """Start what `Order` says; `output` is there at once."""
        output.touch()
        if self._process is None or self._process.poll() is not None:
            self._begin(environment)
        assert self._process is not None and self._process.stdin is not None
        order = Order(
            command=list(command),
            environment=dict(environment),
            output=str(output),
            launches=launches,
            session=session,
            ignored=list(ignored),
        )
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        while (pid := self._answer(PATIENCE)) is None:
            pass
        self._ended.pop(pid, None)
        return Forked(self, pid)

    def call(self, command: Sequence[str], environment: Mapping[str, str], log: Path, **how: Any) -> tuple[int, str]:
        """Start it and wait for its end: its exit status and what it has printed, which the file `log` has."""
        process = self.start(command, environment, log, **how)
        try:
            process.wait(500.0)
        finally:
            process.kill()
        return process.wait(), log.read_text(encoding="utf-8", errors="replace")

    def run(
        self, script: Path, arguments: list[str], ranks: list[dict[str, str]], output: Path, timeout: float
    ) -> bool:
        """Run `script` in one process per environment in `ranks`; whether all ended with status 0.

        What they print goes to the file `output`. Once one has failed, the others are killed after a while.
        """
        output.write_bytes(b"")
        started = [self.start([sys.executable, str(script), *arguments], rank, output) for rank in ranks]
        deadline, failed = time.monotonic() + timeout, False
        while None in [process.poll() for process in started]:
            self._answer(0.05)
            if not failed and any(process.returncode for process in started):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                for process in started:
                    process.kill()
                if not failed:
                    raise TimeoutError(
                        f"{script.name} has not ended after {timeout:.0f} s:\n{output.read_text()[-6000:]}"
                    )
        return not any(process.returncode for process in started)

    def status(self, pid: int, patience: float) -> int | None:
        """The exit status of process `pid`, as `subprocess` has it, or None after so many seconds."""
        if pid not in self._ended:
            self._answer(patience)
        return self._ended.get(pid)

    def _answer(self, patience: float) -> int | None:
        """Read one line, for which it waits so long: the number of a process that was started, else None."""
        assert self._process is not None and self._process.stdout is not None
        if b"\n" not in self._read:
            descriptor = self._process.stdout.fileno()
            if not select.select([descriptor], [], [], patience)[0]:
                if patience >= PATIENCE:
                    raise TimeoutError("the fork server does not answer")
                return None
            self._read += (found := os.read(descriptor, 65536))
            if not found:
                raise ChildProcessError("the fork server has ended")
        line, self._read = self._read.split(b"\n", 1) if b"\n" in self._read else (b"", self._read)
        found_there = json.loads(line) if line else {}
        if "ended" in found_there:
            self._ended[found_there["ended"]] = found_there["status"]
        return found_there.get("started")

    def _begin(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._read = b""
        atexit.register(self._stop)

    def _stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            _kill_all(self._process.pid)
            self._process.wait()


# ---- in the server and what it forks ----


class _Become(BaseException):
    """Raised in a process that was just forked, so that nothing of what its parent was doing is continued in it."""

    def __init__(self, order: Order) -> None:
        self.order = order


class _Child:
    """What `subprocess.Popen` returns, as far as launchers use it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return status


_popen = subprocess.Popen


def _fork_in_place_of(
    command: Any,
    env: Mapping[str, str] | None = None,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    start_new_session: bool = False,
    **how: Any,
) -> Any:
    """`subprocess.Popen` in a launcher: commands of this Python are forked, all else is started as ever."""
    places: list[Any] = [stdin, stdout, stderr]
    if how or not isinstance(command, list) or command[0] != sys.executable or subprocess.PIPE in places:
        streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        return _popen(command, env=env, **streams, start_new_session=start_new_session, **how)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid:
        return _Child(pid)
    for descriptor, place in enumerate(places):
        if place == subprocess.DEVNULL:
            place = os.open(os.devnull, os.O_RDWR)
        elif place == subprocess.STDOUT:
            place = 1
        if place is not None:
            os.dup2(place if isinstance(place, int) else place.fileno(), descriptor)
    raise _Become(
        Order(
            command=command,
            environment=dict(os.environ if env is None else env),
            output=None,
            launches=bool({"deepspeed.launcher.launch", "toolkit.run.launching"}.intersection(command)),
            session=start_new_session,
            ignored=[],
        )
    )


def _become(order: Order) -> None:
    import runpy

    os.environ.clear()
    os.environ.update(order["environment"])
    if order["session"]:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in order["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    if order["output"] is not None:
        to = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(to, descriptor)
        os.close(to)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)  # the server's own is where it answers
    subprocess.Popen = _fork_in_place_of if order["launches"] else _popen  # type: ignore[assignment, misc]
    words = order["command"][1:]
    while words[0] in ("-u", "-P"):
        del words[0]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def _serve() -> NoReturn | None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed while modules are imported is no answer
    gc.disable()
    for name in IMPORTS:
        importlib.import_module(name)
    # What Inductor looks up once in every process: the hash of its own source, what this processor can do, and the text
    # of PyTorch's headers, which it asks the compiler for before it loads a kernel.
    from torch._inductor.codecache import CppPythonBindingsCodeCache, torch_key
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    from toolkit.zero import shared_memory

    torch_key()
    pick_vec_isa()
    CppPythonBindingsCodeCache.load_pybinding([], 'extern "C" void kernel() {}  // as those that use at::vec::')
    shared_memory.leave_out()  # as runs do; for scripts that join a process group by themselves it takes two minutes
    gc.collect()
    gc.enable()
    gc.freeze()  # DeepSpeed collects garbage whenever it builds stage 3: half a second for all that is imported
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a process with {threads} threads cannot be forked"
    running = 0
    while True:
        ready = select.select([0], [], [], 0.01 if running else None)[0]
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            running -= 1
            print(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}), file=answers)
        if not ready:
            continue
        line = sys.stdin.readline()  # one at a time: the next comes when this is answered
        if not line:
            return None
        pid = os.fork()
        if pid == 0:
            answers.close()
            raise _Become(json.loads(line))
        running += 1
        print(json.dumps({"started": pid}), file=answers)


def _live() -> None:
    order: Order | None = None
    while True:
        try:
            return _become(order) if order else _serve()
        except _Become as born:
            order = born.order


if __name__ == "__main__":
    _live()
