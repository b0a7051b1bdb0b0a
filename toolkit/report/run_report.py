"""One run's part of the data model, from what its folder holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Literal

from toolkit.printable import printable
from toolkit.records.categories import PHASES, in_order, model_state, ordered
from toolkit.records.memory import Measurement, Prediction
from toolkit.records.sizes import counted
from toolkit.report.data import (
    Comparison,
    Imbalance,
    Pair,
    Peak,
    PerParameter,
    PhasePair,
    Rank,
    RunFacts,
    RunReport,
    StepTimeline,
    Training,
)
from toolkit.report.facts import check_setups, facts_of
from toolkit.report.read import Folder
from toolkit.report.training import training_of
from toolkit.report.words import headline, listed, percent

_Moment = Literal["at the peak", "between steps", "in host memory"]

_MATTERS = 0.001
"""Share of the whole below which the error of a category says nothing: a few bytes are always off."""


def build_run(folder: Folder, name: str) -> RunReport:
    """The report of one run, called `name`."""
    predicted, measured = folder.predicted, folder.measured
    facts = facts_of(folder)
    training = training_of(folder, facts)
    largest = _largest_rank(measured)
    check_setups(folder)
    missing = sorted(set(range(facts.world_size or 0)) - set(measured)) if measured else []
    if missing:
        ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {listed([str(rank) for rank in missing])}"
        folder.note("measurement", f"{ranks.capitalize()} of {facts.world_size} left no measurement that can be read.")
    peak = _peak(folder, facts, largest)
    held = _held_between_steps(measured)
    ranks_table = [_rank(rank, record) for rank, record in sorted(measured.items())]
    report = RunReport(
        name=name,
        folder=printable(str(folder.path)),
        headline="",
        facts=facts,
        problems=folder.problems,
        training=training,
        peak=peak,
        timeline=_timeline(predicted, largest, measured),
        comparisons=_comparisons(predicted, largest),
        phases=_phases(predicted, largest),
        ranks=ranks_table,
        missing_ranks=missing,
        imbalance=_imbalance(ranks_table),
        blocks=sorted(largest.blocks, key=lambda block: -block.bytes) if largest else [],
        per_parameter=_per_parameter(predicted, largest, facts.parameters),
        held=sum(held.values()) or None,
        held_by=held,
        resident_set=_resident_set(folder, facts),
        changes=sorted(predicted.changes, key=lambda change: -change.saves) if predicted else [],
        predicted_peak=predicted.peak if predicted else None,
        context=predicted.context if predicted else 0,
        host=predicted.host if predicted else {},
        nvme=sum(predicted.nvme.values()) if predicted else 0,
        per_block=predicted.per_block if predicted else {},
        remarks=predicted.remarks if predicted else [],
        measuring=_measuring(largest, training),
        out_of_memory=folder.out_of_memory,
    )
    report.headline = headline(report)
    return report


def _held_between_steps(measured: Mapping[int, Measurement]) -> dict[str, int]:
    """The model state of the rank that holds most of it: what both levels of measuring know, on every device."""
    states = [
        {name: count for name, count in one.resident.items() if model_state({name: count})} for one in measured.values()
    ]
    return in_order(max(states, key=lambda state: sum(state.values()), default={}))


def _resident_set(folder: Folder, facts: RunFacts) -> int | None:
    known = [record.largest_resident_set for record in folder.measured.values() if record.largest_resident_set]
    if not known and (facts.device or "cpu") == "cpu":
        known = [line.memory_bytes for line in folder.steps if line.memory_bytes]
    return max(known, default=None)


def _largest_rank(measured: Mapping[int, Measurement]) -> Measurement | None:
    """The measurement with the largest peak, or resident set where no rank knows a peak."""
    return max(
        measured.values(),
        key=lambda record: (record.peak or 0, record.largest_resident_set or 0, -record.rank),
        default=None,
    )


def _peak(folder: Folder, facts: RunFacts, largest: Measurement | None) -> Peak | None:
    predicted, summary = folder.predicted, folder.summary
    lines = [line.memory_bytes for line in folder.steps if line.memory_bytes]
    peak: Peak | None = None
    if largest is not None and largest.peak is not None:
        peak = Peak(
            bytes=largest.peak,
            kind="allocated",
            source=largest.source,
            rank=largest.rank,
            phase=largest.peak_phase,
            held=largest.at_peak(),
        )
    elif largest is not None and largest.largest_resident_set is not None:
        peak = Peak(
            bytes=largest.largest_resident_set,
            kind="resident set",
            source=largest.source,
            rank=largest.rank,
            before=largest.process,
        )
    elif summary is not None and summary.peak_memory_bytes or lines:
        # What metrics.jsonl holds of a run without a summary: allocated on a GPU, resident on a CPU.
        total = summary.peak_memory_bytes if summary is not None and summary.peak_memory_bytes else max(lines)
        on_accelerator = (facts.device or "cpu") != "cpu"
        peak = Peak(
            bytes=total,
            kind="allocated" if on_accelerator else "resident set",
            source="the training loop, largest rank",
        )
    elif predicted is not None:
        peak = Peak(
            bytes=predicted.peak,
            kind="predicted",
            source="the prediction",
            phase=predicted.peak_phase,
            held=predicted.at_peak(),
        )
    # A resident set is mostly libraries: per parameter it would say nothing.
    if peak is not None and facts.parameters and peak.kind != "resident set":
        peak.per_parameter = peak.bytes / facts.parameters
    return peak


def _timeline(
    predicted: Prediction | None, largest: Measurement | None, measured: Mapping[int, Measurement]
) -> StepTimeline | None:
    with_one = [record for record in ([largest] if largest else []) + list(measured.values()) if record.timeline]
    for record in with_one:
        if record.timeline and any(record.timeline.held.values()):
            return StepTimeline(measured=True, rank=record.rank, step=record.step, timeline=record.timeline)
    if predicted is not None and any(predicted.timeline.held.values()):
        return StepTimeline(measured=False, rank=None, step=None, timeline=predicted.timeline)
    return None


def _pair(name: str, predicted: int, measured: int, total: int) -> Pair:
    matters = max(predicted, measured) >= _MATTERS * total
    error = percent(predicted, measured) if matters else None
    return Pair(name=name, predicted=predicted, measured=measured, error=error)


def _comparisons(predicted: Prediction | None, largest: Measurement | None) -> list[Comparison]:
    if predicted is None or largest is None:
        return []
    comparisons = []
    if largest.peak is not None:
        sizes = predicted.at_peak(), largest.at_peak()
        at_peak = _comparison("at the peak", largest, *sizes, predicted.peak, largest.peak)
        if largest.peak_phase is not None and largest.peak_phase != predicted.peak_phase:
            at_peak.phases = [predicted.peak_phase, largest.peak_phase]
        comparisons.append(at_peak)
    sums: tuple[tuple[_Moment, dict[str, int], dict[str, int]], ...] = (
        ("between steps", predicted.resident, largest.resident),
        ("in host memory", predicted.host, largest.host_memory),
    )
    for moment, before, after in sums:
        if after:
            totals = sum(before.values()), sum(after.values())
            comparisons.append(_comparison(moment, largest, before, after, *totals))
    return comparisons


def _comparison(
    moment: _Moment, record: Measurement, before: dict[str, int], after: dict[str, int], predicted: int, measured: int
) -> Comparison:
    names = ordered({*before, *after}) if after else []
    return Comparison(
        moment=moment,
        rank=record.rank,
        categories=[_pair(name, before.get(name, 0), after.get(name, 0), measured) for name in names],
        model_state=_pair("model state", model_state(before), model_state(after), measured) if after else None,
        total=_pair("total", predicted, measured, measured),
    )


def _phases(predicted: Prediction | None, largest: Measurement | None) -> list[PhasePair]:
    before = {phase.name: phase for phase in predicted.phases} if predicted else {}
    after = {phase.name: phase for phase in largest.phases} if largest else {}
    order = {name: place for place, name in enumerate(PHASES)}
    names = sorted({*before, *after}, key=lambda name: (order.get(name, len(order)), name))
    return [
        PhasePair(
            name=name,
            predicted=before[name].peak if name in before else None,
            measured=after[name].peak if name in after else None,
            resident_set=after[name].resident_set if name in after else None,
        )
        for name in names
    ]


def _rank(rank: int, record: Measurement) -> Rank:
    allocator = record.allocator
    return Rank(
        rank=rank,
        host=record.host,
        device=record.device_name,
        peak=record.peak,
        phase=record.peak_phase,
        held=record.at_peak(),
        resident=sum(record.resident.values()) if record.resident else None,
        resident_set=record.largest_resident_set,
        limit=record.limit,
        reserved=allocator.reserved if allocator else None,
        fragmentation=allocator.fragmentation if allocator else None,
    )


def _imbalance(ranks: list[Rank]) -> Imbalance | None:
    by_peak = all(rank.peak is not None for rank in ranks)
    sizes = {rank.rank: (rank.peak if by_peak else rank.resident_set) or 0 for rank in ranks}
    if len(sizes) < 2 or not all(sizes.values()):
        return None
    first = max(sizes, key=lambda rank: sizes[rank])
    mean = statistics.fmean(sizes.values())
    excesses: dict[str, float] = {}
    if by_peak and all(rank.held for rank in ranks):
        for name, size in next(rank.held for rank in ranks if rank.rank == first).items():
            excesses[name] = size - statistics.fmean(rank.held.get(name, 0) for rank in ranks)
    category = max(excesses, key=lambda name: excesses[name], default=None)
    return Imbalance(
        of="peak" if by_peak else "resident set",
        rank=first,
        largest=sizes[first],
        mean=mean,
        percent=100 * (sizes[first] / mean - 1),
        category=category,
        excess=excesses[category] if category is not None else None,
    )


def _per_parameter(
    predicted: Prediction | None, largest: Measurement | None, parameters: int | None
) -> list[PerParameter]:
    record = largest if largest is not None and largest.at_peak() else predicted
    if record is None or not record.at_peak():
        return []
    at_peak, resident = record.at_peak(), record.resident
    return [
        PerParameter(
            category=name,
            peak=at_peak.get(name, 0),
            resident=resident.get(name, 0) if resident else None,
            peak_per_parameter=at_peak.get(name, 0) / parameters if parameters else None,
            resident_per_parameter=resident.get(name, 0) / parameters if parameters and resident else None,
        )
        for name in ordered({*at_peak, *resident})
    ]


def _measuring(largest: Measurement | None, training: Training | None) -> str | None:
    if largest is None:
        return None
    sentence = f"Measured by {largest.source}, level {largest.level}"
    if largest.step is not None:
        sentence += f", traced in step {largest.step}"
    sentence += f"; measuring took {largest.overhead_seconds:.2f} s over {counted(largest.steps, 'step')}"
    if training is not None and training.seconds > 0 and training.steps == largest.steps:
        sentence += f", {100 * largest.overhead_seconds / training.seconds:.1f} % of their time"
    return sentence + "."
