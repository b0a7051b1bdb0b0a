"""The runs of a comparison: where each one is, how it is started, and whether it has ended."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.compare.plan import CONFIGS, RUNS, Method, Plan, Point
from toolkit.compare.tuning import Tuning, tune
from toolkit.errors import UserError
from toolkit.paths import read_text
from toolkit.records.machine import cores
from toolkit.records.run import CHECKPOINTS, METRICS, RUN, SUMMARY

_FLAGS = ("lr", "warmup")
"""Swept keys that are options of their own."""


def words(point: Point) -> str:
    """A point as the name of a folder and for the screen."""
    return ",".join(f"{key}={value:g}" for key, value in point) or "as-configured"


def point_settings(point: Point) -> tuple[dict[str, float], list[str]]:
    """A point as settings of a run and as assignments for `--set`."""
    flags = {key: value for key, value in point if key in _FLAGS}
    return flags, [f"{key}={value:g}" for key, value in point if key not in _FLAGS]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    method: str
    point: Point
    seed: int

    def __str__(self) -> str:
        return f"{self.method} {words(self.point)} seed {self.seed}"


class Runs:
    """The runs of `plan` in the comparison's folder `out`."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out = plan, out
        self._ended: dict[Cell, float] = {}
        self._ports: set[int] = set()

    def folder(self, cell: Cell) -> Path:
        return self.out / RUNS / cell.method / words(cell.point) / f"seed{cell.seed}"

    def log(self, cell: Cell) -> Path:
        """What the run says."""
        return self.folder(cell).with_suffix(".log")

    def loss(self, cell: Cell) -> float | None:
        """The final validation loss, infinite where there is none since the run diverged; None: it has not ended."""
        if cell not in self._ended:
            summary = read_summary(self.folder(cell))
            if summary is None or (summary.get("interrupted") and not summary.get("diverged")):
                return None
            loss = summary.get("val_loss")
            finite = isinstance(loss, int | float) and math.isfinite(loss) and not summary.get("diverged")
            self._ended[cell] = float(loss) if finite and loss is not None else math.inf
        return self._ended[cell]

    def tuning(self, method: Method) -> Tuning:
        """How far `method` is."""
        return tune(
            method.sweeps,
            self.plan.seeds,
            self.plan.extend,
            lambda point, seed: self.loss(Cell(method.name, point, seed)),
        )

    def losses(self, method: str, point: Point) -> dict[int, float]:
        """The finite final losses at `point` by seed."""
        known = {seed: self.loss(Cell(method, point, seed)) for seed in range(self.plan.seeds)}
        return {seed: loss for seed, loss in known.items() if loss is not None and math.isfinite(loss)}

    def options(self, cell: Cell) -> list[str]:
        """Of `toolkit.train`, for the run."""
        from toolkit.run.settings import line_of

        settings = {"config": str(self.out / CONFIGS / f"{cell.method}.json"), **self.plan.settings}
        flags, assignments = point_settings(cell.point)
        settings |= {"seed": cell.seed, "run_dir": str(self.folder(cell))}
        settings |= {name: f"{value:g}" for name, value in flags.items()}
        settings.pop("overrides", None)  # those are in the method's JSON
        return line_of(settings) + [text for assignment in assignments for text in ("--set", assignment)]

    def shown(self, cell: Cell) -> str:
        """The command line that makes the run, for a reader."""
        launched = ["deepspeed", "--num_gpus", str(self.plan.ranks), "--module"]
        start = ["python", "-m"] if self.plan.ranks == 1 else launched
        return shlex.join([*start, "toolkit.train", *self.options(cell)])

    def command(self, cell: Cell) -> list[str]:
        """What starts the run, or resumes it."""
        from toolkit.run.ranks import launch_command

        return launch_command("toolkit.train", self.options(cell), self.plan.ranks, self._port())

    def _port(self) -> int:
        """A free port that no other run has been given: one that has just started has not taken its own yet."""
        from toolkit.run.ranks import free_port

        port = next(port for port in iter(free_port, None) if port not in self._ports)
        self._ports.add(port)
        return port

    def environment(self, jobs: int) -> dict[str, str]:
        """Of a run beside `jobs` - 1 others: the cores are shared out."""
        from toolkit.run.ranks import TOKENIZER_THREADS, tokenizer_threads

        own = max(1, cores() // (jobs * self.plan.ranks))
        return {"OMP_NUM_THREADS": str(own), TOKENIZER_THREADS: str(tokenizer_threads(own))} | os.environ

    def clear(self, cell: Cell) -> bool:
        """Remove a run that was cut before its first checkpoint, which nothing can resume; whether there was one."""
        folder = self.folder(cell)
        if not any((folder / name).exists() for name in (RUN, METRICS)):
            return False
        if self.resumable(cell):
            return False
        shutil.rmtree(folder)
        return True

    def resumable(self, cell: Cell) -> bool:
        """Whether a run has saved a checkpoint."""
        return any((self.folder(cell) / CHECKPOINTS).glob("global_step*"))

    def remove_checkpoints(self, cell: Cell) -> None:
        shutil.rmtree(self.folder(cell) / CHECKPOINTS, ignore_errors=True)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a run; None where there is none, or one that is cut short."""
    try:
        found = json.loads(read_text(folder, SUMMARY))
    except (UserError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
