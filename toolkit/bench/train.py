"""Whole training steps: runs of several methods and of the Hugging Face Trainer, processes in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.bench.record import LEAST, Row, Spread
from toolkit.bench.step import Keep, Measured
from toolkit.compare.plan import CONFIGS, Method, Plan, save
from toolkit.compare.runs import Cell, Runs, read_summary
from toolkit.errors import UserError
from toolkit.paths import read_text
from toolkit.records.run import METRICS, read_metrics
from toolkit.records.sizes import counted
from toolkit.run.ranks import free_port, launch_command, with_threads

TRAINER = "hf-trainer"
"""The method that is the Hugging Face Trainer with DeepSpeed's AdamW, on the same model and batch."""
WARM = 3
"""Steps of a run that do not count: the first ones compile and allocate."""
_LAST_LINES = 15


COMPILED = ", compiled"
"""After the name of a method in the rows of runs whose model is compiled."""


@dataclass(frozen=True)
class Finished:
    """What a run of one method found.

    Attributes:
        seconds: of each step that counts, from the end of the one before to its own: what is done between them counts.
        peak: bytes.
        mfu_of_a_token: the MFU of one token a second; None where it is not known what the devices can do.
    """

    seconds: list[float]
    peak: int
    mfu_of_a_token: float | None = None


def measure(
    methods: Sequence[Method],
    trainer: Method | None,
    order: Sequence[str],
    settings: Mapping[str, Any],
    ranks: int,
    threads: int,
    rounds: int,
    baseline: str,
    folder: Path,
    *,
    say: Callable[[str], None],
    keep: Keep = lambda found: None,
) -> Measured:
    """Run every method in each of `rounds`, in the order of their names in `order`; with `compile_model` among the
    settings each but the Trainer a second time, with its model compiled.

    Args:
        methods: runs of `toolkit.train`.
        trainer: the JSON that the Hugging Face Trainer runs with, if it is one of them.
        settings: of every run, by their names in `RunSettings`; `steps` includes the first `WARM`.
        folder: empty; for what runs write.

    Raises:
        UserError: a run failed.
    """
    plain = {key: value for key, value in settings.items() if key != "compile_model"}
    ways = {"": (plain, folder)} | ({} if plain == settings else {COMPILED: (dict(settings), folder / "compiled")})
    runs = dict[str, Runs]()
    for way, (given, place) in ways.items():
        plan = Plan(settings=given, ranks=ranks, seeds=rounds, baseline=baseline, methods=list(methods))
        place.mkdir(exist_ok=True)
        save(plan, place)
        runs[way] = Runs(plan, place)
    if trainer is not None:
        (folder / CONFIGS / f"{TRAINER}.json").write_text(json.dumps(trainer.config), encoding="utf-8")
    each = [(name, way) for name in order for way in (runs if name != TRAINER else [""])]
    found: dict[str, list[Finished]] = {name + way: [] for name, way in each}
    for number in range(rounds):
        for name, way in each:
            say(f"round {number + 1} of {rounds}: {name}{way}")
            one = _trainer_run if name == TRAINER else _own_run
            found[name + way].append(one(runs[way], name, number, threads))
        rows = [_row(name, found, _tokens(settings, ranks), baseline) for name in found]
        measured = Measured(rows=rows, notes=_few(rounds))
        keep(measured)
    return measured


def _few(rounds: int) -> list[str]:
    if rounds >= LEAST:
        return []
    return [
        f"{counted(rounds, 'round')} only: speed is a median of fewer than {LEAST} ratios, and a slow minute of the "
        "machine may show in it."
    ]


def _tokens(settings: Mapping[str, Any], ranks: int) -> int:
    """Of one optimizer step."""
    return int(settings["seq_len"] * settings["micro_batch"] * settings["grad_accum"] * ranks)


def _row(name: str, found: Mapping[str, list[Finished]], tokens: int, baseline: str) -> Row:
    seconds = [second for run in found[name] for second in run.seconds]
    medians = {one: [statistics.median(run.seconds) for run in found[one]] for one in (name, baseline)}
    faster = [other / own for own, other in zip(medians[name], medians[baseline], strict=True)]
    rates = Spread.of([tokens / second for second in seconds])
    counts = {"speed_ratio": statistics.median(faster), "peak_bytes": max(run.peak for run in found[name])}
    if (mfu := found[name][0].mfu_of_a_token) is not None:
        counts["mfu"] = rates.median * mfu
    return Row(name=name, timed={"step_seconds": Spread.of(seconds), "tokens_per_s": rates}, counted=counts)


def _own_run(runs: Runs, name: str, number: int, threads: int) -> Finished:
    cell = Cell(name, (), number)
    finish(runs.command(cell), threads, runs.log(cell), name)
    folder = runs.folder(cell)
    summary = read_summary(folder) or {}
    records = [record for record in read_metrics(folder / METRICS) if record["step"] > WARM]
    seconds = [record["step_time_s"] + record["between_s"] for record in records]
    one = records[0]
    mfu = one["mfu"] / one["tokens_per_s"] if "mfu" in one else None
    return Finished(seconds, int(summary["peak_memory_bytes"]), mfu)


def _trainer_run(runs: Runs, name: str, number: int, threads: int) -> Finished:
    folder = runs.out / name / str(number)
    folder.mkdir(parents=True)
    settings = runs.plan.settings | {
        "config": str(runs.out / CONFIGS / f"{name}.json"),
        "out": str(folder / "found.json"),
        "seed": number,
    }
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    command = launch_command("toolkit.bench.hf_trainer", [str(folder / "settings.json")], runs.plan.ranks, free_port())
    finish(command, threads, folder / "log", name)
    found = json.loads(read_text(folder, "found.json"))
    return Finished(found["seconds"][WARM:], found["peak_bytes"], found["mfu_of_a_token"])


def finish(command: Sequence[str], threads: int, log: Path, name: str) -> None:
    """Run `command`, of whose ranks each has `threads`, to its end. Raises UserError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | with_threads(threads)
    with open(log, "wb") as sink:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = next((line for line in reversed(lines) if line.startswith("error: ")), "").removeprefix("error: ")
        if not told:
            print("\n".join(lines[-_LAST_LINES:]), file=sys.stderr)
        raise UserError(f"the run of {name} failed: {told or f'it ended with status {done.returncode}.'}")
