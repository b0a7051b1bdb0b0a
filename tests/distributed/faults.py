"""Kills a run again and again at random moments and looks at what is left; `test_faults.py` says how often.

One run of two ranks under the `deepspeed` launcher continues through all kills. After each, every checkpoint that has
its name must be intact, `latest` must be one of them, and the next start must resume from the newest. At the end the
metrics must be those of a run that nobody disturbed.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from fork_server import Forked
from ranks import SERVER, deepspeed_command, environment

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.store import LATEST, Store
from toolkit.records.run import read_metrics

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
TARGETS = ("one rank", "all ranks", "the ranks' launcher", "deepspeed")


@dataclass
class Kill:
    """What one kill hit, and what it cost."""

    target: str
    while_saving: bool
    reached: int
    resumed: int

    @property
    def lost(self) -> int:
        return self.reached - self.resumed


@dataclass
class Victim:
    """A run that can be killed. `arguments` are those of launch/train.py."""

    folder: Path
    arguments: list[str]
    save_every: int
    seed: int = 0
    kills: list[Kill] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.log = self.folder.with_suffix(".log")
        self.before = 0  # size of the log when the present start began

    def start(self) -> Forked:
        self.before = self.log.stat().st_size if self.log.exists() else 0
        command = deepspeed_command(2, TRAIN, *self.arguments, "--run-dir", str(self.folder))
        # As launch/slurm.sh: DeepSpeed's launchers would die of it.
        ignored = [signal.SIGUSR1]
        return SERVER.start(command, environment(), self.log, launches=True, session=True, ignored=ignored)

    def steps(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        records = read_metrics(metrics) if metrics.exists() else []
        return records[-1]["step"] if records else 0

    def saving(self) -> bool:
        folder = self.folder / "checkpoints"
        return folder.is_dir() and any(path.name.startswith(".saving-") for path in folder.iterdir())

    def newest(self) -> int:
        return max(Store(self.folder / "checkpoints").steps(), default=0)

    def ask_to_stop(self, send: Callable[[Forked], None]) -> int:
        """Start, send a signal after a few steps, and wait for the end of all; returns the exit status."""
        resumed = self.newest()
        process = self.start()
        try:
            self._wait(process, lambda: self._began(resumed) and self.steps() >= resumed + 2)
            everyone = psutil.Process(process.pid).children(recursive=True)
            send(process)
            status = process.wait(timeout=120)
        finally:
            process.kill()
        _, alive = psutil.wait_procs(everyone, timeout=120)
        assert not alive, alive
        return status

    def kill_once(self) -> None:
        """Start, let it make some steps, kill something, and wait until nothing of it is left."""
        resumed = self.newest()
        process = self.start()
        try:
            self._wait(process, lambda: self._began(resumed) and self.steps() >= resumed + 1)
            goal = self.steps() + self.random.randint(0, 2 * self.save_every)
            self._wait(process, lambda: self.steps() >= goal)
            if self.random.random() < 0.5:  # so that many kills hit a save, which is short
                self._wait(process, self.saving, patience=1.0, pause=0.0005)
                time.sleep(self.random.random() * 0.03)
            else:
                time.sleep(self.random.random() * 0.1)
            target = self.random.choice(TARGETS)
            saving = self.saving()
            victims = self._victims(process, target)
            everyone = psutil.Process(process.pid).children(recursive=True)
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
            process.wait(timeout=120)
            _, alive = psutil.wait_procs(everyone, timeout=120)
            assert not alive, f"{target} was killed, and these live on: {alive}"
        finally:
            process.kill()
        self.check()
        self.kills.append(Kill(target, saving, self.steps(), self.newest()))

    def _began(self, resumed: int) -> bool:
        """Whether the metrics are this start's already, and not the last one's."""
        said = self.log.read_bytes()[self.before :]
        return (b"resumed from" if resumed else b"files in") in said

    def _victims(self, process: Forked, target: str) -> list[psutil.Process]:
        runner = psutil.Process(process.pid)
        [launcher] = runner.children()
        ranks = launcher.children()
        assert len(ranks) == 2, ranks
        return {
            "one rank": [self.random.choice(ranks)],
            "all ranks": ranks,
            "the ranks' launcher": [launcher],
            "deepspeed": [runner],
        }[target]

    def _wait(
        self,
        process: Forked,
        ready: Callable[[], bool],
        patience: float = 180.0,
        pause: float = 0.01,
    ) -> None:
        deadline = time.monotonic() + patience
        while not ready():
            assert process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            if time.monotonic() > deadline:
                assert patience < 10, self.log.read_text(errors="replace")[-3000:]
                return
            time.sleep(pause)

    def check(self) -> None:
        """What must hold at any moment."""
        store = Store(self.folder / "checkpoints")
        for step in store.steps():
            assert manifests.damage(store.path(step), manifests.read(store.path(step))) is None
        latest = store.folder / LATEST
        if latest.exists():
            assert (store.folder / latest.read_text()).is_dir()

    def finish(self) -> None:
        """The last start, which nobody disturbs."""
        process = self.start()
        assert process.wait(timeout=600) == 0, self.log.read_text(errors="replace")[-3000:]
