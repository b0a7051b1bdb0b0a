"""`toolkit train`: DeepSpeed's launcher starts the ranks of a run, under a process that passes signals on to them.

    toolkit train              hears the signals, and ends with the run's status; it loads no torch
      this file                in a session of its own: DeepSpeed's launcher of this machine, or its runner
        deepspeed.launcher     where it is the runner: one on each machine
          toolkit.train        a rank

Of a terminal's Ctrl-C the launcher would end with a status of its own, in place of the ranks', and the runner with a
traceback before the ranks have saved. For ranks of this machine only, the runner would find out how many there are and
start the launcher, which imports torch and DeepSpeed again: seconds. A single rank needs none of them.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from toolkit.errors import UserError, nearest
from toolkit.run import ranks
from toolkit.run.compiling import hear_of_the_end_of
from toolkit.run.restarting import Restarts
from toolkit.run.settings import RunSettings
from toolkit.run.stopping import INTERRUPTED
from toolkit.sentences import one_line

MODULE = "toolkit.train"
RUNNER, ALONE = "runner", "alone"
"""What is started: DeepSpeed's runner, or a single rank; else it is a number of ranks."""
LAUNCHERS = ("pdsh", "mpich", "impi")
"""By which DeepSpeed starts other machines' ranks, and tells them which they are."""
_OF_SEVERAL = ("num_nodes", "no_ssh", "master_addr", "launcher")
"""Options that the launcher ignores without a hostfile."""
_SHOWN = {
    **{name: name.replace("_", "-") for name in ("exclude", "no_ssh", "master_addr", "launcher")},
    **{"num_gpus": "ranks", "num_nodes": "nodes"},
}
"""What `toolkit train` calls options of the launcher."""
HOSTFILE = Path("/job/hostfile")
"""Where DeepSpeed looks for one that nobody has named."""
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_COUNT = "import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)"


def train(options: Mapping[str, Any], settings: RunSettings, restarts: int = 0) -> int:
    """Start the ranks of a run and wait for their end.

    Args:
        options: those of DeepSpeed's launcher that were given, by name.
        settings: of the run.
        restarts: how often it is started again, at most.

    Returns:
        The run's exit status. A single rank takes the place of this process, unless it may have to start again, and
        nothing is returned.

    Raises:
        UserError: the options contradict one another, or name nothing.
    """
    check(options)
    if not settings.start_anyway:
        ranks.check_room(options.get("num_gpus", 1))
    again = Restarts(settings, restarts)
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # nothing is imported that happens to lie in the working folder
    local = not several_machines(options.get("hostfile"))
    simple = local and not options.keys() - {"num_gpus", "master_port"}
    count = (options["num_gpus"] if "num_gpus" in options else _devices()) if simple else 0

    def start(arguments: list[str]) -> tuple[int, bool]:
        launching = [sys.executable, "-m", "toolkit.run.launching", str(os.getpid())]
        if simple and count <= 1:
            rank = [sys.executable, "-m", MODULE, *arguments]
            own = environment | ({"MASTER_PORT": str(options["master_port"])} if "master_port" in options else {})
            if not restarts:
                _become(rank, own)
            return _pass_on([*launching, ALONE, *rank], own)
        ports = {"master_port": ranks.free_port()} if local else {}
        given = {name: value for name, value in options.items() if not simple or name == "master_port"}
        line = [f"--{name}" if value is True else f"--{name}={value}" for name, value in (ports | given).items()]
        launching.append(str(count) if simple else RUNNER)
        return _pass_on([*launching, *line, "--module", MODULE, *arguments], environment)

    return again.until_the_end(start)


def several_machines(hostfile: Path | None) -> bool:
    """Whether the ranks are those of a hostfile: the one that is named, or the one that DeepSpeed finds."""
    return hostfile is not None or HOSTFILE.is_file()


def check(options: Mapping[str, Any]) -> None:
    """Raise UserError for what DeepSpeed's launcher would take for something else, or end in a traceback."""
    hostfile, launcher = options.get("hostfile"), options.get("launcher")
    # The launcher takes a missing hostfile for "this machine only" and would train alone on each.
    if hostfile is not None and not Path(hostfile).is_file():
        raise UserError(f"--hostfile {hostfile}: there is no such file.")
    if launcher is not None and launcher.lower() not in LAUNCHERS:
        raise UserError(
            f"--launcher is {launcher!r}, but must be one of {', '.join(LAUNCHERS)}.{nearest(launcher, LAUNCHERS)}"
        )
    filters = [name for name in ("include", "exclude") if name in options]
    counts = [name for name in ("num_gpus", "num_nodes") if name in options]
    if len(filters) == 2 or (filters and counts):
        raise UserError(
            f"--{filters[0]} and --{_SHOWN[(filters[1:] + counts)[0]]} both say which ranks there are; give one."
        )
    if ("no_ssh" in options) != ("node_rank" in options):
        raise UserError("--no-ssh and --node-rank, this machine's place in the hostfile, go together.")
    if "no_ssh" in options and "master_addr" not in options:  # the launcher would ask for it, by ssh
        raise UserError("--no-ssh needs --master-addr, the address of the first machine, the same on all of them.")
    if not several_machines(hostfile):
        several = next((name for name in _OF_SEVERAL if name in options), None)
        if several is not None:
            raise UserError(
                f"--{_SHOWN[several]} is for several machines: name them with --hostfile, a line each, a slots=8."
            )
    _check_machines(options, hostfile)


def _check_machines(options: Mapping[str, Any], hostfile: Path | None) -> None:
    """Raise UserError for a hostfile that is wrong, and for options that name machines which it does not have."""
    from toolkit.run.hosts import read_hostfile

    path = hostfile if hostfile is not None else HOSTFILE
    several = several_machines(hostfile)
    names = list(read_hostfile(path)) if several else ["localhost"]
    for option in ("include", "exclude"):
        parts = options[option].split("@") if options.get(option) else []
        unknown = next((name for part in parts if (name := part.partition(":")[0].strip()) not in names), None)
        if unknown is not None:
            alone = "without --hostfile there is only localhost"
            there = f"--hostfile {path} has no such machine" if several else alone
            raise UserError(f"--{option} names {unknown!r}, but {there}.{nearest(unknown, names)}")
    asked = options.get("num_nodes", 1)
    if asked > len(names):
        raise UserError(f"--nodes is {asked}, but --hostfile {path} names {len(names)}.")
    most = options.get("num_nodes", len(names)) - 1
    if options.get("node_rank", 0) > most:
        raise UserError(
            f"--node-rank is {options['node_rank']}, but must be 0 to {most}, its place in --hostfile {path}."
        )


# ---- a single rank --------------------------------------------------------------------------------------------------


def _devices() -> int:
    """GPUs that torch finds on this machine. It is asked in a process of its own, and only if it was built for any."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or _torch_knows_none():
        return 0
    found = subprocess.run([sys.executable, "-P", "-c", _COUNT], stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise UserError("torch cannot be imported: see above.")
    return int(found.stdout.split()[-1])


def _torch_knows_none() -> bool:
    """Whether torch was built for CPUs only, as far as that can be told without its import, which takes seconds."""
    place = importlib.util.find_spec("torch")
    if place is None or place.origin is None:
        raise UserError("torch is not installed.")
    if sys.platform != "linux" or metadata.entry_points(group="torch.backends"):
        return False
    built = runpy.run_path(str(Path(place.origin).with_name("version.py")))
    return not any(built.get(kind, True) for kind in ("cuda", "hip", "xpu"))


def _become(command: list[str], environment: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)


# ---- many -----------------------------------------------------------------------------------------------------------


def _pass_on(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, bool]:
    """Run `command`, which starts ranks, and pass signals on to those of this machine.

    Returns:
        Its status, and whether there were any signals.
    """
    import psutil

    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if process is None:
            return
        with contextlib.suppress(psutil.Error, ProcessLookupError):  # it has just ended
            started = _ranks(process.pid)
            for rank in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)
            if not started:  # not yet, or on other machines: DeepSpeed ends them
                os.killpg(process.pid, signal.SIGTERM)

    # Under nohup SIGHUP stays ignored.
    heard = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        if asked:
            pass_on(asked[0], None)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # DeepSpeed's launcher ends with the negative number of the signal that ended a rank.
    killed = -status if status < 0 else 256 - status
    if killed not in signal.valid_signals():
        return status, bool(asked)
    if asked and killed in (*asked, signal.SIGTERM):  # before there was anything to save
        return INTERRUPTED, True
    who = "a rank" if status > 0 or command[4] == ALONE else "DeepSpeed's launcher"
    print(f"note: {who} was killed by {signal.Signals(killed).name}.", file=sys.stderr)
    return (128 + killed if status < 0 else status), bool(asked)


def _ranks(started: int) -> list[Any]:
    """The processes of this machine's ranks. The launcher that started them is the process `started` or its child; or
    that is the only rank."""
    import psutil

    process = psutil.Process(started)
    found = [process] if process.cmdline()[1:3] == ["-m", MODULE] else []
    for child in process.children():
        with contextlib.suppress(psutil.Error):
            words = child.cmdline()
            if any("deepspeed.launcher.launch" in word for word in words):
                found += child.children()
            elif MODULE in words:
                found.append(child)
    return found


def _run_launcher(count: int | None, arguments: Sequence[str]) -> None:
    """DeepSpeed's launcher of `count` ranks, or its runner, with what it refuses as one sentence."""
    gc.disable()  # it imports much and makes little
    # SLURM's warning goes to all. It is for ranks, and would end others; ranks do not inherit what only does nothing.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    ranks.settle_accelerator()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # the launcher would take it for the numbers of CPU ranks
    quiet = "--log_level=critical"  # a rank's status is told by this package, and whole command lines help nobody
    try:
        if count is None:
            from deepspeed.launcher import runner

            runner.main([quiet, *arguments])
        else:
            from deepspeed.launcher import launch

            machines = json.dumps({"localhost": _numbers(count)})
            world = base64.urlsafe_b64encode(machines.encode()).decode()
            sys.argv = [launch.__file__, f"--world_info={world}", quiet, *arguments]
            launch.main()
    except (ValueError, RuntimeError, AssertionError, OSError, subprocess.SubprocessError) as error:
        print(f"error: DeepSpeed's launcher: {one_line(error).rstrip('.')}.", file=sys.stderr)
        sys.exit(2)


def _numbers(count: int) -> list[int | str]:
    """Which of this machine's devices the ranks take, as CUDA_VISIBLE_DEVICES names them."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return list(range(count))
    if count > accelerator.device_count():
        raise ValueError(f"{count} ranks were asked for, but this machine shows {accelerator.device_count()} GPUs")
    visible = [os.environ[name] for name in accelerator.visible_devices_envs() if os.environ.get(name)]
    return list(visible[0].split(",")[:count]) if visible else list(range(count))


if __name__ == "__main__":
    hear_of_the_end_of(int(sys.argv[1]))
    if sys.argv[2] == ALONE:
        _become(sys.argv[3:], os.environ)
    _run_launcher(None if sys.argv[2] == RUNNER else int(sys.argv[2]), sys.argv[3:])
