"""Kills and damage, on real ranks: what `docs/reliability.md` promises."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from faults import TARGETS, TRAIN, Victim
from ranks import SERVER, deepspeed_command, environment, toolkit_command
from test_checkpoints import WAYS, World, steps_of

from toolkit.records.run import read_metrics
from toolkit.report import build_report, render
from toolkit.run.folder import RunFolder

AMCS = WAYS["amcs-2"]
SAVE_EVERY = 3


def kill_and_compare(root: Path, kills: int, steps: int) -> list[str]:
    """Kill a run so often, finish it, and compare it with an undisturbed one; returns what each kill did."""
    # Given twice, the last one counts.
    arguments = World(root).arguments("x", AMCS, 2, "--steps", str(steps), "--save-every", str(SAVE_EVERY))
    victim = Victim(root / "killed", arguments, SAVE_EVERY)
    said = []
    for number in range(kills):
        victim.kill_once()
        kill = victim.kills[-1]
        said.append(f"{number} {kill}, lost {kill.lost}")
        print(said[-1], flush=True)
        assert kill.lost <= SAVE_EVERY, said[-1]
    victim.finish()
    plain = Victim(root / "plain", arguments, SAVE_EVERY)
    plain.finish()
    keys = ("step", "loss", "lr", "grad_norm", "alpha", "skipped")
    one, other = (
        [tuple(record[key] for key in keys) for record in read_metrics(run.folder / "metrics.jsonl")]
        for run in (victim, plain)
    )
    assert len(one) == steps and one == other
    return [json.dumps(Counter(kill.lost for kill in victim.kills))] + said


def test_a_kill_leaves_the_curve_as_it_was(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, kills=1, steps=15)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills_leave_the_curve_as_it_was(tmp_path: Path) -> None:
    said = kill_and_compare(tmp_path, kills=100, steps=800)
    report = os.environ.get("LEANSTATE_FAULT_REPORT")
    if report:
        Path(report).write_text("\n".join(said) + "\n")
    for target in TARGETS:
        assert sum(target in line for line in said) >= 10
    assert sum("while_saving=True" in line for line in said) >= 10


def test_signals_stop_all_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    victim = Victim(tmp_path / "run", World(tmp_path).arguments("x", AMCS, 2, "--steps", "100000"), 4)
    # SLURM's warning reaches every process of the job.
    assert victim.ask_to_stop(lambda process: os.killpg(process.pid, signal.SIGUSR1)) == 130
    first = victim.newest()
    assert first == victim.steps() >= 2
    # `deepspeed` dies of SIGTERM at once; the ranks notice.
    assert victim.ask_to_stop(lambda process: process.send_signal(signal.SIGTERM)) == -signal.SIGTERM
    victim.check()
    assert victim.newest() == victim.steps() > first
    second = victim.newest()
    # A closed session: every process of it gets the signal, the launchers die of it.
    assert victim.ask_to_stop(lambda process: os.killpg(process.pid, signal.SIGHUP)) == -signal.SIGHUP
    victim.check()
    assert victim.newest() == victim.steps() > second
    assert victim.log.read_text().count("a checkpoint is in") == 3


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    """`deepspeed launch/train.py 2>&1 | head -1`: it is done to the end, nothing of it fails."""
    arguments = World(tmp_path).arguments("run", AMCS, 2, "--steps", "40")
    command = deepspeed_command(2, TRAIN, *arguments)
    read, write = os.pipe()
    process = subprocess.Popen(command, env=environment(), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert error.count("note: nobody reads the output of this run any more") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 40


STOPPED = """
from toolkit.run import stopping

stopping.SILENT_SECONDS, stopping.STOPPED_SECONDS, stopping._BEAT_SECONDS = 3.0, 8.0, 1.0
"""


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_the_run(tmp_path: Path) -> None:
    plugin = tmp_path / "stopped.py"
    plugin.write_text(STOPPED)
    arguments = World(tmp_path).arguments("x", AMCS, 2, "--steps", "100000", "--plugin", str(plugin))
    victim = Victim(tmp_path / "run", arguments, SAVE_EVERY)
    process = victim.start()
    victim._wait(process, lambda: victim.steps() >= 5)
    everyone = psutil.Process(process.pid).children(recursive=True)
    [launcher] = psutil.Process(process.pid).children()
    rank = max(launcher.children(), key=lambda p: p.pid)
    rank.suspend()
    assert process.wait(timeout=120) == 110, victim.log.read_text()
    _, alive = psutil.wait_procs(everyone, timeout=60)  # the launcher gives the one that is stopped half a minute
    assert not alive
    log = victim.log.read_text()
    assert f"note: rank 1 (process {rank.pid} on " in log and "note: all ranks end, because rank 1 " in log
    assert "Traceback" not in log
    victim.check()
    assert victim.newest() >= 3


ENDS = """
import ctypes, os, signal
from toolkit.run import ranks, training

step = training.optimizer_step

def out_of_memory():
    bytearray(1 << 60)

def fail():
    raise ZeroDivisionError

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def waiting(engine, *rest):
    if engine.global_steps == 2:
        if ranks.rank() == 1:
            {what}()
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # the second never returns: as a wait for a GPU, no signal ends it
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    return step(engine, *rest)

training.optimizer_step = waiting
"""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("out_of_memory", 12, "error: rank 1 ran out of memory"),
        pytest.param("fail", 1, "ZeroDivisionError", marks=pytest.mark.slow),
        pytest.param("kill", -signal.SIGKILL % 256, "ended without a word: it was killed", marks=pytest.mark.slow),
    ],
)
def test_one_rank_that_ends_ends_all_within_15_seconds(tmp_path: Path, what: str, status: int, said: str) -> None:
    """Though the other one waits in C, where nothing of Python runs."""
    plugin = tmp_path / "ends.py"
    plugin.write_text(ENDS.format(what=what))
    arguments = World(tmp_path).arguments("x", AMCS, 2, "--steps", "100", "--plugin", str(plugin))
    victim = Victim(tmp_path / "run", arguments, SAVE_EVERY)
    process = victim.start()
    victim._wait(process, lambda: victim.steps() == 2)
    began = time.monotonic()
    everyone = psutil.Process(process.pid).children(recursive=True)
    assert process.wait(timeout=60) == status, victim.log.read_text()
    _, alive = psutil.wait_procs(everyone, timeout=max(0.0, began + 15 - time.monotonic()))
    assert not alive and time.monotonic() < began + 15
    log = victim.log.read_text()
    assert said in log and log.count("Traceback") == (what == "fail"), log
    page = victim.folder / "memory" / "rank1-out-of-memory.md"
    assert page.exists() == (what == "out_of_memory")
    how = f"with status {status}." if status < 128 else "without a word: it was killed, or has crashed."
    assert re.search(rf"note: rank 0 ends as well: rank 1 \(process \d+ on \S+\) has ended {re.escape(how)}", log)


# ---- damage ----

NEWEST, OLDER = "global_step7", "global_step4"


def truncate(run: Path) -> str:
    file = next((run / "checkpoints" / NEWEST).glob("*rank_1*optim_states.pt"))
    os.truncate(file, file.stat().st_size // 2)
    return file.name


def flip(run: Path, pattern: str = "*rank_0*optim_states.pt") -> str:
    file = next((run / "checkpoints" / NEWEST).glob(pattern))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.name


def remove(run: Path) -> str:
    file = next((run / "checkpoints" / NEWEST).glob("*rank_1*optim_states.pt"))
    file.unlink()
    return file.name


def flip_manifest(run: Path) -> str:
    return flip(run, "manifest.json")


def remove_manifest(run: Path) -> str:
    (run / "checkpoints" / NEWEST / "manifest.json").unlink()
    return "manifest.json"


DAMAGES = {damage.__name__: damage for damage in (truncate, flip, remove, flip_manifest, remove_manifest)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run of two ranks that was stopped after step 7, and the same run undisturbed."""
    made = World(tmp_path_factory.mktemp("damage"))
    runs = [{"run": made.arguments("base", AMCS, 2), "stop_at": 7}, {"run": made.arguments("plain", AMCS, 2)}]
    steps_of(made, "base-ranks", 2, runs)
    assert {path.name for path in (made.root / "base" / "checkpoints").glob("global*")} == {NEWEST, OLDER}
    return made


def losses(world: World, run: str) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in world.records(run)]


def test_damage_is_named_and_the_older_checkpoint_taken(world: World) -> None:
    names = {}
    for name, damage in DAMAGES.items():
        shutil.copytree(world.root / "base", world.root / name)
        names[name] = damage(world.root / name)
    # What a kill leaves behind: half a checkpoint under a hidden name, half a line, a `latest` that was not moved.
    left = world.root / "left-behind"
    shutil.copytree(world.root / "base", left)
    shutil.copytree(left / "checkpoints" / NEWEST, left / "checkpoints" / f".saving-{NEWEST}-0" / NEWEST)
    (left / "checkpoints" / "latest").write_text(OLDER)
    with open(left / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    hopeless = world.root / "hopeless"
    shutil.copytree(world.root / "base", hopeless)
    for path in hopeless.rglob("*model_states.pt"):
        path.unlink()
    runs = [*DAMAGES, "left-behind", "hopeless"]
    steps = [{"run": world.arguments(run, AMCS, 2)} for run in runs]
    results = dict(zip(runs, steps_of(world, "damage-ranks", 2, steps), strict=True))
    for name, file in names.items():
        said = results[name]["said"]
        assert file in said and f"taken is {OLDER}" in said, said
        assert losses(world, name) == losses(world, "plain")
        # The damaged one has been replaced on the way.
        assert {p.name for p in (world.root / name / "checkpoints").glob("[!.]*")} >= {OLDER, "global_step8"}
    assert (
        "damaged" not in results["left-behind"]["said"] and f"{NEWEST}, after step 7" in results["left-behind"]["said"]
    )
    assert losses(world, "left-behind") == losses(world, "plain")
    assert not list((left / "checkpoints").glob(".saving-*"))
    assert "every checkpoint" in results["hopeless"] and "mp_rank_00_model_states.pt is missing" in results["hopeless"]


KILLED = """
import os, signal, time
from pathlib import Path
from toolkit.run import ranks, training

step, build, mark = training.optimizer_step, training.build_engine, Path(MARK)

def slow(*arguments):
    engine = build(*arguments)
    if ranks.rank() == 1:
        engine.module.hf.base_model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    return engine

def dying(engine, *rest):
    if engine.global_steps == 6 and ranks.rank() == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(engine, *rest)

training.optimizer_step, training.build_engine = dying, slow
"""


def test_a_run_whose_rank_was_killed_starts_again_and_says_which_rank_is_slow(world: World, tmp_path: Path) -> None:
    plugin = tmp_path / "killed.py"
    plugin.write_text(KILLED.replace("MARK", repr(str(tmp_path / "mark"))))
    arguments = world.arguments("again", AMCS, 2, "--plugin", str(plugin))
    command = toolkit_command("train", "--ranks", "2", "--restarts", "2", *arguments)
    status, log = SERVER.call(command, environment(), tmp_path / "log", launches=True)
    assert status == 0, log
    said = "and starts again from its checkpoint of step 4 (restart 1 of at most 2)."
    assert log.count(said) == 1 and log.count("starts again") == 1 and "Traceback" not in log, log
    assert losses(world, "again") == losses(world, "plain")
    quick, slow = json.loads((world.root / "again" / "summary.json").read_text())["forward_seconds"]
    assert slow > quick + 0.1
    page = render(build_report([world.root / "again"]), "markdown")
    percent = f"{100 * (slow / quick - 1):.0f} %"
    assert (
        f"Rank 1 is the slowest: what it does alone, forward passes and the waiting for their data, takes {percent}"
        in page
    )


@pytest.mark.slow
def test_one_folder_belongs_to_one_run(world: World) -> None:
    run = world.root / "taken"
    shutil.copytree(world.root / "base", run)
    before = (run / "metrics.jsonl").read_bytes()
    held = RunFolder(run, {}, {}, checkpoints=True, resuming=True)
    [refused] = steps_of(world, "second", 1, [{"run": world.arguments("taken", AMCS, 1)}])
    assert f"{run} is in use by another run" in refused
    held.close()
    assert (run / "metrics.jsonl").read_bytes() == before
    # An earlier checkpoint of a run resumes in another folder only.
    earlier = ["--resume", str(run / "checkpoints" / OLDER)]
    branch = world.arguments("branch", AMCS, 1, *earlier)
    refused, resumed = steps_of(
        world, "third", 1, [{"run": world.arguments("taken", AMCS, 1, *earlier)}, {"run": branch}]
    )
    assert "has a checkpoint of step 7" in refused
    assert resumed["steps"] == 6 and (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_full_and_a_read_only_disk(world: World, tmp_path: Path) -> None:
    """A real file system of 4 MB: a checkpoint fits, two do not."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    arguments = world.arguments("x", AMCS, 1, "--keep-last", "1", "--run-dir", str(disk / "run"))
    train = shlex.join([sys.executable, "-m", "toolkit.train", *arguments])
    script = f"""
        mount -t tmpfs -o size=4m tmpfs {disk}
        {train} > {tmp_path}/full.log 2>&1; echo $? > {tmp_path}/full
        ls -A {disk}/run/checkpoints > {tmp_path}/left
        mount -o remount,ro,size=60m {disk}
        {train} > {tmp_path}/read-only.log 2>&1; echo $? > {tmp_path}/read-only
        mount -o remount,rw {disk}
        {train} > {tmp_path}/again.log 2>&1; echo $? > {tmp_path}/again
        cp -r {disk}/run {out}
    """
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs user namespaces to mount a small disk")
    subprocess.run(["unshare", "-rm", "sh", "-c", script], env=environment(), check=True, timeout=500)
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in ("full", "read-only", "again")}
    status = {name: int((tmp_path / name).read_text()) for name in logs}
    assert status == {"full": 2, "read-only": 2, "again": 0}, logs
    assert "No space left on device" in logs["full"] and "Traceback" not in logs["full"]
    assert (tmp_path / "left").read_text().split() == ["global_step4", "latest", "zero_to_fp32.py"]
    assert "cannot be written: Read-only file system" in logs["read-only"] and "Traceback" not in logs["read-only"]
    assert "global_step4, after step 4" in logs["again"]
    [alone] = steps_of(world, "alone", 1, [{"run": world.arguments("alone", AMCS, 1)}])
    found = [(record["step"], record["loss"]) for record in read_metrics(out / "metrics.jsonl")]
    assert found == losses(world, "alone")
