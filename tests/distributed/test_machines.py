"""Two machines in miniature: the numbers of one, a cable that is cut, and each way of starting ranks without ssh."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import machines
import psutil
import pytest
from machines import CUT, Machine, two_machines
from ranks import SERVER, environment, free_port, toolkit_command
from test_checkpoints import EXACT, WAYS, World, steps_of

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def compare(world: World, one: str, other: str) -> None:
    """The runs `one` and `other` have the same numbers, to the last bit."""
    curves = [[tuple(record.get(key) for key in EXACT) for record in world.records(run)] for run in (one, other)]
    assert len(curves[0]) == 10 and curves[0] == curves[1]


@pytest.mark.alone
def test_a_cable_that_is_cut_ends_both_machines_and_one_alone_continues(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "cut.py").write_text(CUT.replace("STEPS", "7"))
    arguments = world.arguments("cut", WAYS["amcs-2"], 2)
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    with two_machines() as both:
        port = str(free_port())
        started = []
        for rank, machine in enumerate(both):
            own = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}
            own |= {"MASTER_ADDR": both[0].address, "MASTER_PORT": port, "MACHINE": str(machine.process)}
            command = [sys.executable, machines.__file__, *arguments, "--plugin", str(tmp_path / "cut.py")]
            started.append(SERVER.start(command, environment() | own, logs[rank]))
        assert [process.wait(timeout=300) for process in started] == [110, 110], [log.read_text() for log in logs]
        said = [log.read_text() for log in logs]
        for rank, machine in enumerate(both):
            assert f"{machine.name}: rank {rank}, at most " in said[0] and f"{machine.name}: " not in said[1], said
        for other, (machine, words) in enumerate(zip(both, reversed(said), strict=True)):
            name = f"rank {other} (process {started[other].pid} on {machine.name})"
            assert f"note: {name} has given no sign of life for 2 s" in words, words
            assert f"note: all ranks end, because {name} has given no sign of life for 6 s" in words, words
            assert "Traceback" not in words and words.count("all ranks end") == 1, words
    plain = world.arguments("plain", WAYS["amcs-2"], 2)
    resumed, whole = steps_of(world, "one-machine", 2, [{"run": arguments}, {"run": plain}])
    assert "global_step4, after step 4" in resumed["said"] and whole["steps"] == 10
    compare(world, "cut", "plain")


def command(way: str, machine: Machine, place: int, first: Machine, hosts: Path, arguments: list[str]) -> list[str]:
    where = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(place), "--master_addr", first.address]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += [f"--node_rank={place}", f"--master_addr={first.address}", "-m", "toolkit.train"]
    multinode = ["bash", str(LAUNCH / "multinode.sh"), str(hosts), str(place), first.address]
    start = {"toolkit": toolkit_command("train", *where), "torchrun": torchrun, "multinode.sh": multinode}[way]
    return machine.inside(*start, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "way"), [(1, "multinode.sh"), (2, "torchrun"), (3, "toolkit")])
def test_two_machines_have_the_losses_of_one(tmp_path: Path, stage: int, way: str) -> None:
    world, hosts = World(tmp_path), tmp_path / "hosts"
    hosts.write_text("machine-0 slots=1\nmachine-1 slots=1\n")
    arguments = world.arguments("two", WAYS[f"amcs-{stage}"], 2)
    logs = [tmp_path / f"log-{place}" for place in range(2)]
    with two_machines() as both:
        started = []
        for place, machine in enumerate(both):
            line = command(way, machine, place, both[0], hosts, arguments)
            with open(logs[place], "w") as log:
                started.append(subprocess.Popen(line, env=environment(), stdout=log, stderr=log))
        try:
            statuses = [process.wait(timeout=300) for process in started]
        finally:
            for process in started:
                process.kill()
        assert statuses == [0, 0], [log.read_text() for log in logs]
    steps_of(world, "one-machine", 2, [{"run": world.arguments("one", WAYS[f"amcs-{stage}"], 2)}])
    compare(world, "two", "one")


@pytest.mark.slow
def test_a_machine_that_is_switched_off_while_ranks_start_ends_the_other(tmp_path: Path) -> None:
    """Its launcher is killed with its rank before that has joined; the first machine does not wait half an hour."""
    world, hosts = World(tmp_path), tmp_path / "hosts"
    hosts.write_text("machine-0 slots=1\nmachine-1 slots=1\n")
    (tmp_path / "ends.py").write_text("import os; from toolkit.run import ranks\nif ranks.rank(): os._exit(9)\n")
    arguments = [*world.arguments("run", WAYS["amcs-2"], 2), "--plugin", str(tmp_path / "ends.py")]
    with two_machines() as both:
        lines = [command("toolkit", machine, n, both[0], hosts, arguments) for n, machine in enumerate(both)]
        logs = [tmp_path / f"log-{place}" for place in range(2)]
        started = []
        for line, log in zip(lines, logs, strict=True):
            with open(log, "w") as file:
                started.append(subprocess.Popen(line, env=environment(), stdout=file, stderr=file))
        began = time.monotonic()
        statuses = [process.wait(timeout=200) for process in started]
        assert statuses == [1, 9] and time.monotonic() < began + 120, [log.read_text() for log in logs]
        said = logs[0].read_text()
        assert "rank 0 ends as well: rank 1 (process " in said and "has ended without a word: it was killed" in said
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
