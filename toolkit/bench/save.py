"""Checkpoints: how long training waits, how long until one is on the disk, and how long loading takes.

In each round every method is a process of its own (`python -m toolkit.bench.save SETTINGS.json`, or as many ranks of
it): it makes a few steps, since codes of fresh state would be squeezed to nothing, then saves and loads.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.agreed import agreed
from toolkit.bench.record import Row, Spread
from toolkit.bench.step import Keep, Measured
from toolkit.bench.train import finish
from toolkit.compare.plan import Method
from toolkit.paths import read_text
from toolkit.run.ranks import free_port, launch_command

DEEPSPEED = "deepspeed"
"""The method that is DeepSpeed's AdamW, saved and loaded by DeepSpeed's own functions."""
WARM = 1
"""Saves of a process that do not count: the first one touches its memory for the first time."""
TIMED = ("pause_seconds", "save_seconds", "load_seconds")


def measure(
    methods: Mapping[str, Method],
    settings: Mapping[str, Any],
    ranks: int,
    threads: int,
    repeats: int,
    folder: Path,
    *,
    say: Callable[[str], None],
    keep: Keep = lambda found: None,
) -> Measured:
    """Save and load once with each of `methods`, by name, in each of `repeats` rounds.

    Args:
        settings: of `RunSettings`; `steps` are made before the first save.
        folder: empty; on the disk that is to be measured.

    Raises:
        UserError: a method failed.
    """
    found = Measured()
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for number in range(repeats):
        for name, method in methods.items():
            say(f"round {number + 1} of {repeats}: {name}")
            own = folder / name
            own.mkdir(parents=True)
            (own / "config.json").write_text(json.dumps(method.config), encoding="utf-8")
            asked = {"run": dict(settings) | {"config": str(own / "config.json")}, "way": name, "out": str(own)}
            (own / "settings.json").write_text(json.dumps(asked), encoding="utf-8")
            command = launch_command("toolkit.bench.save", [str(own / "settings.json")], ranks, free_port())
            finish(command, threads, own / "log", name)
            taken[name].append(json.loads(read_text(own, "found.json")))
            shutil.rmtree(own)
        found = Measured(rows=[_row(name, each) for name, each in taken.items()])
        keep(found)
    return found


def _row(name: str, rounds: Sequence[Mapping[str, Any]]) -> Row:
    timed = {key: Spread.of([found[key] for found in rounds]) for key in TIMED}
    size = float(rounds[-1]["bytes"])
    counted = {
        "checkpoint_bytes": size,
        "bytes_per_parameter": size / rounds[-1]["parameters"],
        "save_bytes_per_s": size / timed["save_seconds"].median,
        "load_bytes_per_s": size / timed["load_seconds"].median,
    }
    return Row(name=name, timed=timed, counted=counted)


# ---- one rank -----------------------------------------------------------------------------------------------------


def main() -> None:
    from toolkit.run import ranks

    ranks.prepare_environment()
    ranks.start()
    from torch import distributed

    from toolkit import data
    from toolkit.run.engine import build_engine, optimizer_step
    from toolkit.run.prepare import prepare
    from toolkit.run.settings import check_settings

    asked = json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))
    prepared = agreed(lambda: prepare(check_settings(**asked["run"])))
    engine, batch = build_engine(prepared), prepared.batch
    batches = data.rank_batches(
        prepared.data, rank=ranks.rank(), world_size=ranks.world_size(), micro_batch=batch.micro
    )
    for _ in range(prepared.settings.steps):
        optimizer_step(engine, batches, batch.accumulation)
    batches.close()
    kind = _Deepspeed if asked["way"] == DEEPSPEED else _Own
    way, found = kind(engine, Path(asked["out"])), dict[str, Any]()
    for step in range(1, WARM + 2):
        os.sync()  # what was left to be written before is no part of this
        distributed.barrier()
        began = time.perf_counter()
        pause = way.save(step)
        saved = time.perf_counter()
        distributed.barrier()
        loads = time.perf_counter()
        way.load(step)
        distributed.barrier()
        found = dict(zip(TIMED, (pause, saved - began, time.perf_counter() - loads), strict=True))
    if ranks.rank() == 0:
        size = sum(path.stat().st_size for path in way.folder(step).rglob("*.pt"))
        text = json.dumps(found | {"bytes": size, "parameters": prepared.parameters})
        (Path(asked["out"]) / "found.json").write_text(text, encoding="utf-8")
    way.close()
    ranks.finish()


class _Own:
    """This package's saver."""

    def __init__(self, engine: Any, out: Path) -> None:
        from toolkit.checkpoint.store import Store
        from toolkit.run.saving import Saver

        self._engine, self._store = engine, Store(out / "checkpoints", keep_last=1)
        self._saver = Saver(engine, self._store)

    def folder(self, step: int) -> Path:
        return self._store.path(step)

    def save(self, step: int) -> float:
        """Save and wait until it is on the disk; seconds that training would have waited."""
        paused = self._saver.start(step, {})
        problem = self._saver.wait()
        if problem is not None:
            raise OSError(problem)
        return paused

    def load(self, step: int) -> None:
        from toolkit.checkpoint.universal import open_checkpoint
        from toolkit.zero.checkpoint import load

        load(self._engine, open_checkpoint(self.folder(step)))

    def close(self) -> None:
        self._saver.close()


class _Deepspeed:
    """DeepSpeed's own functions, which return when everything is handed to the system, not when it is on the disk."""

    def __init__(self, engine: Any, out: Path) -> None:
        self._engine, self._out = engine, out / "checkpoints"

    def folder(self, step: int) -> Path:
        return self._out / str(step)

    def save(self, step: int) -> float:
        from toolkit.run import ranks

        began = time.perf_counter()
        self._engine.save_checkpoint(str(self._out), tag=str(step))
        seconds = time.perf_counter() - began
        if ranks.rank() == 0 and step > 1:
            shutil.rmtree(self.folder(step - 1))
        return seconds

    def load(self, step: int) -> None:
        self._engine.load_checkpoint(str(self._out), tag=str(step))

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main()
