"""What a run's report says of its training, from its metrics and its summary."""

from __future__ import annotations

import os
import statistics

from toolkit.records.run import LAST_STEPS, METRICS, SUMMARY
from toolkit.records.sizes import counted
from toolkit.report.data import BatchChange, ExpertLayer, LossCurve, Resumed, RunFacts, Slowest, Training
from toolkit.report.read import Folder, Routers, StepLine
from toolkit.report.words import listed

_SLOWER = 5.0
"""Percent from which on a rank is called the slowest."""


def training_of(folder: Folder, facts: RunFacts) -> Training | None:
    """What the folder's metrics and summary say; None without a step."""
    if not folder.steps:
        if folder.run is not None and not any(METRICS in problem.sentence for problem in folder.problems):
            folder.note("training", f"{METRICS} holds no step.")
        return None
    steps, final = folder.steps, [line.loss for line in folder.steps[-LAST_STEPS:]]
    complete = _complete(folder, facts)
    finite = [loss for loss in final if loss is not None]
    times = [line.step_time_s for line in steps if line.step_time_s]
    speeds = [line.tokens_per_s for line in steps if line.tokens_per_s is not None]
    flops = [line.flops_per_s for line in steps if line.flops_per_s is not None]
    mfu = [line.mfu for line in steps if line.mfu is not None]
    waits = [(line.data_seconds, line.step_time_s or 0.0) for line in steps if line.data_seconds is not None]
    during = sum(seconds for _, seconds in waits)
    validated = [line for line in steps if "val_loss" in line.model_fields_set]
    bad = [line.step for line in steps if line.loss is None]
    if bad:
        shown = listed([str(step) for step in bad]) if len(bad) <= 6 else f"{bad[0]} to {bad[-1]} ({len(bad)} of them)"
        folder.note("training", f"The loss is not finite at step{'' if len(bad) == 1 else 's'} {shown}.")
    seen = [line.seen() for line in steps]
    return Training(
        steps=len(steps),
        complete=complete,
        tokens=sum(count or 0 for count in seen) if None not in seen else None,
        batches=_batches(steps, facts),
        changes=[Resumed(first=line.step, changed=line.changed) for line in steps if line.changed],
        seconds=sum(times),
        compile_s=sum(line.compile_s for line in steps),
        loss=statistics.fmean(finite) if len(finite) == len(final) else None,
        loss_steps=len(final),
        val_loss=validated[-1].val_loss if validated else None,
        tokens_per_s=statistics.median(speeds) if speeds else None,
        flops_per_s=statistics.median(flops) if flops else None,
        mfu=statistics.median(mfu) if mfu else None,
        waiting=sum(waited for waited, _ in waits) / during if during > 0 else None,
        slowest=_slowest(folder.summary.forward_seconds if folder.summary is not None else []),
        experts=_experts([line.routers for line in steps if line.routers is not None][-LAST_STEPS:]),
        nonfinite_steps=bad,
        skipped_steps=sum(line.skipped for line in steps),
        curve=LossCurve(
            steps=[line.step for line in steps],
            loss=[line.loss for line in steps],
            lr=[line.lr for line in steps],
            grad_norm=[line.grad_norm for line in steps],
            tokens_per_s=[line.tokens_per_s for line in steps],
            val_steps=[line.step for line in validated],
            val_loss=[line.val_loss for line in validated],
        ),
    )


def _complete(folder: Folder, facts: RunFacts) -> bool:
    """Whether all steps were made; without a summary the metrics say so."""
    if os.path.lexists(folder.path / SUMMARY):
        return folder.summary is not None and not folder.summary.interrupted
    last, made = folder.steps[-1].step, counted(len(folder.steps), "step")
    if facts.steps is not None and last >= facts.steps:
        folder.note(
            "training",
            f"There is no {SUMMARY}, and all {made} are in {METRICS}: what it alone has, such as which rank is the "
            "slowest, is not known.",
        )
        return True
    folder.note(
        "training",
        f"There is no {SUMMARY}: the run crashed, was killed or is still going; {made} of it are in {METRICS}.",
    )
    return False


def _slowest(seconds: list[float]) -> Slowest | None:
    """`seconds`: of each rank. A few percent are chance."""
    if len(seconds) < 2:
        return None
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    usual = statistics.median(seconds[:rank] + seconds[rank + 1 :])
    percent = 100 * (seconds[rank] / usual - 1) if usual > 0 else 0.0
    return Slowest(rank=rank, percent=percent) if percent >= _SLOWER else None


def _experts(routers: list[Routers]) -> list[ExpertLayer]:
    """`routers`: of the steps to average."""
    layers: dict[str, list[tuple[float, float, float, int]]] = {}
    for of in routers:
        rows = zip(of.busiest, of.idlest, of.evenness, of.unused, strict=True)
        for layer, row in zip(of.layers, rows, strict=True):
            layers.setdefault(layer, []).append(row)
    return [
        ExpertLayer(
            layer=layer,
            busiest=statistics.fmean(row[0] for row in rows),
            idlest=statistics.fmean(row[1] for row in rows),
            evenness=statistics.fmean(row[2] for row in rows),
            unused=statistics.fmean(row[3] for row in rows),
            over=len(rows),
        )
        for layer, rows in layers.items()
    ]


def _batches(steps: list[StepLine], facts: RunFacts) -> list[BatchChange]:
    """Sequences of the steps, from where they were others than before."""
    found: list[BatchChange] = []
    for line in steps:
        seen = line.seen()
        sequences = line.sequences or (round(seen / facts.seq_len) if seen and facts.seq_len else facts.global_batch)
        if sequences and (not found or found[-1].sequences != sequences):
            found.append(BatchChange(first=line.step, sequences=sequences))
    return found
