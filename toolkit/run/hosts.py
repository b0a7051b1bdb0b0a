"""The machines of a hostfile beside this one: whether ssh reaches them, their clocks and what is installed there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import UserError

SKEW_SECONDS = 1.0
"""A difference of clocks that is worth a sentence: files and logs of several machines are put in order by them."""
LIMIT_SECONDS = 60.0

# The clock comes first, as soon as Python runs: what is measured with it is half the way there and back.
_ASK = """
import time
print(time.time(), flush=True)
import json
from toolkit.run.folder import versions
print(json.dumps(versions()))
"""


@dataclass(frozen=True)
class Host:
    """What one machine answered; `problem` in place of the rest where it did not."""

    name: str
    ahead_seconds: float = 0.0
    """Of its clock before this machine's, too small by the time that its answer was on the way."""
    versions: dict[str, str] | None = None
    problem: str | None = None


def read_hostfile(path: Path) -> dict[str, int]:
    """The machines in a hostfile of DeepSpeed, in their order, and how many ranks each has.

    Raises:
        UserError: it cannot be read, a line is not "worker-0 slots=8", or a machine has no ranks or two lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: {getattr(error, 'strerror', None) or error}.") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"--hostfile {path}, line {number}"
        found = re.match(r"\s*(\S+)\s+slots=(\d+)(?=\s|#|$)", line)
        if found is None or found.group(1).startswith("-"):
            raise UserError(f"{where}: must be a machine and its ranks, as in worker-0 slots=8.")
        name, count = found.group(1), int(found.group(2))
        if name in slots:
            raise UserError(f"{where}: {name} has a line already; give each machine one, with all its ranks.")
        if not count:  # its launcher would start nothing there, and call that a success
            raise UserError(f"{where}: {name} has no ranks; put a # before the line to leave the machine out.")
        slots[name] = count
    if not slots:
        raise UserError(f"--hostfile {path} names no machine; write one a line, as in worker-0 slots=8.")
    return slots


def ask(names: Collection[str]) -> list[Host]:
    """Ask all of them at once, by ssh as the launcher does: with this Python, which must be where it is here."""
    if shutil.which("ssh") is None:
        raise UserError("there is no ssh, which reaches the machines of a hostfile.")
    with ThreadPoolExecutor(len(names)) as workers:
        return list(workers.map(_ask, names))


def _ask(name: str) -> Host:
    command = f"{shlex.quote(sys.executable)} -P -c {shlex.quote(_ASK)}"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={LIMIT_SECONDS / 2:.0f}"]
    asked = subprocess.Popen(
        ["ssh", *options, name, command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    late = threading.Timer(LIMIT_SECONDS, asked.kill)
    late.start()
    try:
        assert asked.stdout is not None
        first = asked.stdout.readline()
        here = time.time()
        rest, said = asked.communicate()
        versions = dict(json.loads(rest))
        return Host(name, float(first) - here, versions)
    except ValueError:
        why = said.strip().splitlines() or [f"no answer within {LIMIT_SECONDS:.0f} s"]
        return Host(name, problem=why[-1])
    finally:
        late.cancel()


def problems(hosts: Sequence[Host], here: dict[str, str]) -> list[str]:
    """A sentence for each thing that will not work; `here`: this machine's versions."""
    found = []
    for host in hosts:
        if host.versions is None:
            found.append(
                f"{host.name} does not answer by ssh ({host.problem}): let it do so without a password, with this "
                "Python in the same place; or start each machine by itself (--no-ssh)."
            )
            continue
        theirs = host.versions
        other = [f"{key} {theirs.get(key)} (here {mine})" for key, mine in here.items() if theirs.get(key) != mine]
        if other:
            found.append(f"{host.name} has {', '.join(other)}: install the same on all machines.")
        if abs(host.ahead_seconds) > SKEW_SECONDS:
            way = "ahead of" if host.ahead_seconds > 0 else "behind"
            found.append(
                f"the clock of {host.name} is {abs(host.ahead_seconds):.1f} s {way} this machine's: let both follow a "
                "time server."
            )
    return found
