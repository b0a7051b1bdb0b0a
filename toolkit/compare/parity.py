"""Whether a model trains alike however a step is cut: into micro-batches, over ranks, by ZeRO stage.

The same weights, the same sequences and as many steps; what is compared is what the runs wrote, losses and the weights
of their last checkpoints. All is in fp32, so that nothing but the order of sums differs: codes of 8 bits would turn a
difference in the last place into one of a whole code.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.errors import UserError
from toolkit.records.run import CHECKPOINTS, METRICS, read_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.checkpoint.source import Source

STEPS = 4
SEQUENCES = 4
"""Of a step, over all ranks and micro-batches."""
SEQ_LEN = 64
LOSS = 1e-5
"""Relative difference of the losses of any step up to which two runs agree."""
WEIGHTS = 1e-3
"""The same of a parameter's change: |theta - theta_reference| / |theta_reference - theta_0|, over its elements."""
_LAST = 4000


@dataclass(frozen=True)
class Way:
    """One way to make the steps."""

    stage: int
    ranks: int
    accumulation: int

    def __str__(self) -> str:
        return f"stage {self.stage}, {self.ranks} rank{'s' * (self.ranks > 1)}, {self.accumulation} micro-batch" + (
            "es" * (self.accumulation > 1)
        )

    @property
    def micro_batch(self) -> int:
        return SEQUENCES // (self.ranks * self.accumulation)


WAYS = tuple(Way(stage, ranks, count) for ranks, count in ((1, 1), (1, SEQUENCES), (2, 1)) for stage in (2, 1, 3))
"""The first is what all others are compared with."""


@dataclass(frozen=True)
class Compared:
    """How far a way is from the reference at most: `loss` over steps, `weights` over parameters, at `parameter`."""

    way: Way
    loss: float
    weights: float
    parameter: str

    @property
    def agrees(self) -> bool:
        return self.loss <= LOSS and self.weights <= WEIGHTS  # false for what is not finite


def parity(model: str, data: str, folder: Path, say: Callable[[str], None]) -> list[Compared]:
    """Train `model` in every way of `WAYS`, and compare.

    Args:
        model: a preset, or a folder with a config.json.
        data: as `--data` of a run.
        folder: where the runs go; nothing may be there.
        say: shows a line about what is being done.

    Raises:
        UserError: a run was refused, or failed.
    """
    import torch

    from toolkit import models

    for way in WAYS:
        say(f"training: {way}")
        _train(model, data, way, _folder(folder, way))
    start = models.build_model(model, dtype=torch.float32, seed=0)
    weights = {name: param.detach() for name, param in start.named_parameters()}
    return compare(weights, {way: _folder(folder, way) for way in WAYS})


def compare(start: Mapping[str, Tensor], runs: Mapping[Way, Path]) -> list[Compared]:
    """The first of `runs`, by their folders, against all others.

    Args:
        start: the weights that all began with.
    """
    from toolkit.checkpoint.source import Source
    from toolkit.checkpoint.store import name_of

    opened = {way: Source(path / CHECKPOINTS / name_of(STEPS)) for way, path in runs.items()}
    losses = {way: [float(step["loss"]) for step in read_metrics(path / METRICS)] for way, path in runs.items()}
    first, *others = runs
    found = []
    for way in others:
        apart = [abs(a - b) / abs(b) for a, b in zip(losses[way], losses[first], strict=True)]
        parameter, weights = max(_weights(start, opened[way], opened[first]), key=lambda one: _worst(one[1]))
        found.append(Compared(way, max(apart, key=_worst), weights, parameter))
    return found


def _worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _weights(start: Mapping[str, Tensor], run: Source, reference: Source) -> list[tuple[str, float]]:
    found = []
    for name, (_, place) in reference.sharding.by_name.items():
        mine, theirs = (source.weights(name, 0, place.numel) for source in (run, reference))
        moved = (theirs - start[name].reshape(-1)).norm().item()
        apart = (mine - theirs).norm().item()
        found.append((name, apart / moved if moved else math.inf if apart else 0.0))
    return found


def _folder(folder: Path, way: Way) -> Path:
    return folder / f"stage{way.stage}-ranks{way.ranks}-micro{way.accumulation}"


def _train(model: str, data: str, way: Way, folder: Path) -> None:
    from toolkit.run import ranks
    from toolkit.run.settings import line_of

    exact = ["bf16.enabled=false", "optimizer.params.weights=fp32", "optimizer.params.state_format=fp32"]
    # Below any gradient that matters, above the noise of two orders of a sum, of which Adam would make whole steps.
    exact += ["optimizer.params.compile=false", "optimizer.params.eps=1e-6"]
    options = line_of(
        {"model": model, "data": data, "config": f"amcs_zero{way.stage}", "overrides": exact}
        | {"steps": STEPS, "seq_len": SEQ_LEN, "lr": 1e-3, "warmup": 0.0, "seed": 0}
        | {"micro_batch": way.micro_batch, "grad_accum": way.accumulation}
        | {"eval_every": 0, "save_every": STEPS, "memory_profile": "off", "run_dir": folder}
    )
    command = ranks.launch_command("toolkit.train", options, way.ranks, ranks.free_port())
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).splitlines()
        problem = next((line for line in reversed(said) if line.startswith("error: ")), None)
        if problem is not None:
            raise UserError(f"{way}: {problem.removeprefix('error: ')}")
        raise UserError(f"{way}: the run ended with status {done.returncode}: {' '.join(said)[-_LAST:]}")
