"""Ranks that begin with everything imported.

Importing PyTorch, DeepSpeed and transformers takes a rank 5 to 10 seconds of processor time, most cases of the tests
less than one. So one process imports them and forks every rank: real processes with a process group of their own, as
the `deepspeed` launcher makes them, with the environment that it sets. What the launcher itself does is tested where
tests start it.

As a script it is the server: it takes a launch as a line of JSON, {"script", "arguments", "ranks": [environment of
each], "output": file}, and answers with a line, the exit status of each rank.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

IMPORTS = (
    "torch._inductor.compile_fx",
    "torch.fx.experimental.proxy_tensor",
    "deepspeed",
    "transformers.models.qwen3.modeling_qwen3",
    "toolkit.train",
    "toolkit.run.training",
)
GRACE = 20.0
"""Seconds that other ranks have when one has failed."""


class ForkServer:
    """The process that forks the ranks of this process's tests; started when first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, script: Path, arguments: list[str], ranks: list[dict[str, str]], output: Path, timeout: float
    ) -> bool:
        """Run `script` in one process per environment in `ranks`; whether all ended with status 0.

        What they print goes to the file `output`.
        """
        if self._process is None or self._process.poll() is not None:
            self._start(ranks[0])
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        order = {"script": str(script), "arguments": arguments, "ranks": ranks, "output": str(output)}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self._stop()
            raise TimeoutError(f"{script.name} has not ended after {timeout:.0f} s:\n{output.read_text()[-6000:]}")
        return not any(json.loads(self._process.stdout.readline()))

    def _start(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(self._stop)

    def _stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _become(rank: dict[str, str], script: str, arguments: list[str], output: str) -> None:
    import runpy

    os.environ.clear()
    os.environ.update(rank)
    to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(to, descriptor)
    os.close(to)
    sys.stdout = os.fdopen(1, "w", buffering=1)  # the server's own is where it answers
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def _wait(children: list[int]) -> list[int]:
    """Their exit statuses; once one has failed the others are killed after a while."""
    left, statuses, deadline = set(children), dict.fromkeys(children, 0), float("inf")
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                for other in left:
                    os.kill(other, signal.SIGKILL)
                deadline = float("inf")
        elif pid in left:
            left.remove(pid)
            statuses[pid] = status
            if status and deadline == float("inf"):
                deadline = time.monotonic() + GRACE
    return [statuses[pid] for pid in children]


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed while modules are imported is no answer
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage whenever it builds stage 3: half a second for all that is imported
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a process with {threads} threads cannot be forked"
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for rank in order["ranks"]:
            pid = os.fork()
            if pid == 0:
                answers.close()
                return _become(rank, order["script"], order["arguments"], order["output"])
            children.append(pid)
        print(json.dumps(_wait(children)), file=answers)


if __name__ == "__main__":
    _serve()
