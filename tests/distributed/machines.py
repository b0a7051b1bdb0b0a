"""Machines in miniature: namespaces with a network and a host name of their own, joined by a cable that can be cut.

As a script it is a rank of `launch/train.py` on the machine that the variable `MACHINE` names.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

NAMESPACES = ("net", "uts")


@dataclass
class Machine:
    """`process` holds its namespaces."""

    name: str
    address: str
    process: int

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.process}", "--net", "--uts", *command]

    def do(self, *command: str) -> None:
        subprocess.run(self.inside(*command), check=True)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Skips where this process may not make them."""
    tools = ("unshare", "nsenter", "ip")
    if not all(map(shutil.which, tools)) or subprocess.run(["unshare", "-nu", "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces, networks of its own and root")
    holders = [
        subprocess.Popen(["unshare", "-nu", "sh", "-c", f"hostname machine-{n}; echo; exec sleep 900"], stdout=-1)
        for n in range(2)
    ]
    try:
        for holder in holders:
            assert holder.stdout is not None and holder.stdout.read(1)
        found = [Machine(f"machine-{n}", f"10.9.0.{n + 1}", holder.pid) for n, holder in enumerate(holders)]
        there = f"type veth peer name eth0 netns {found[1].process}".split()
        found[0].do("ip", "link", "add", "eth0", *there)
        for machine in found:
            machine.do("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                machine.do("ip", "link", "set", device, "up")
        yield found[0], found[1]
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


CUT = """
import subprocess
from toolkit.run import ranks, stopping, training

stopping.SILENT_SECONDS, stopping.STOPPED_SECONDS, stopping._BEAT_SECONDS = 2.0, 6.0, 0.5
step = training.optimizer_step

def cutting(engine, *rest):
    if engine.global_steps == STEPS and ranks.rank() == 0:
        subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    return step(engine, *rest)

training.optimizer_step = cutting
"""
"""A plug-in that cuts the cable after STEPS steps, and makes ranks notice that sooner."""


def main() -> None:
    for name in NAMESPACES:
        with open(f"/proc/{os.environ['MACHINE']}/ns/{name}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
    from toolkit.train import main

    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    main()
