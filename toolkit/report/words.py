"""Numbers and sentences of a report, the same in every format."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.records.memory import BESIDE
from toolkit.records.sizes import size_text
from toolkit.report.data import Comparison, Imbalance, Peak, RunReport, Slowest

UNKNOWN = "–"
_WHEN = {
    "init": "before the first step",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "reduce": "while gradients are reduced",
    "step": "in the optimizer's step",
    "eval": "in validation",
    "checkpoint": "while a checkpoint is saved",
}


def size(count: float | None) -> str:
    """Bytes in GB, MB or kB, powers of 1000; with a minus sign where negative."""
    if count is None:
        return UNKNOWN
    return f"−{size_text(-count)}" if count < 0 else size_text(count)


def number(value: float | None, digits: int = 2) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 1, unit: str = "") -> str:
    """`value` with its sign, and none for a zero."""
    if value is None:
        return UNKNOWN
    text = f"{value:+,.{digits}f}"
    if not text.strip("+-0.,"):
        text = text[1:]
    return text.replace("-", "−") + unit


def duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{hours:.1f} h"


def percent(predicted: float, measured: float) -> float | None:
    """How far `predicted` is from `measured`, in percent of the latter; None where that is zero."""
    return 100 * (predicted - measured) / measured if measured else None


def share(part: float, whole: float) -> str:
    """`part` in percent of `whole`."""
    value = 100 * part / whole if whole else 0.0
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.1f} %"


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def batch_words(run: RunReport) -> str | None:
    """Sequences of a step, and from which step on they were others."""
    batches = run.training.batches if run.training else []
    if not batches:
        return None if run.facts.global_batch is None else f"{run.facts.global_batch:,}"
    first, *others = batches
    return "; ".join([f"{first.sequences:,}", *(f"{one.sequences:,} from step {one.first:,} on" for one in others)])


def headline(run: RunReport) -> str:
    """The peak, bytes per parameter and what holds most, or the end of a run that ran out of memory."""
    parts = []
    if run.out_of_memory:
        ranks = sorted({explained.rank for explained in run.out_of_memory if explained.rank is not None})
        who = f"Rank{'s' if len(ranks) > 1 else ''} {listed([str(rank) for rank in ranks])}" if ranks else "A rank"
        record = next((explained.record for explained in run.out_of_memory if explained.record is not None), None)
        asked = f" and asked for {size(record.asked)} more" if record is not None and record.asked is not None else ""
        holding = f": it held {size(sum(record.held.values()))}{asked}" if record is not None and len(ranks) < 2 else ""
        parts.append(f"{who} ran out of memory{holding}.")
    if run.peak is None:
        parts.append("How much memory this run took is not known.")
        return " ".join(parts)
    if run.peak.kind == "resident set" and run.held is not None:
        per = (
            f": {run.held / run.facts.parameters:.2f} bytes for each of {run.facts.parameters:,} parameters"
            if run.facts.parameters
            else ""
        )
        parts.append(f"The model holds {size(run.held)} between steps{per}.")
    else:
        parts.append(peak_sentence(run.peak, run.facts.parameters))
    if run.peak.kind == "resident set" and run.predicted_peak is not None:
        parts.append(f"The predicted peak is {size(run.predicted_peak)}.")
    if run.peak.held:
        most = max(run.peak.held, key=lambda name: run.peak.held[name] if run.peak else 0)
        held = run.peak.held[most]
        parts.append(f"The largest part is {most}: {size(held)}, {share(held, run.peak.bytes)}.")
    return " ".join(parts)


def peak_sentence(peak: Peak, parameters: int | None) -> str:
    where = f" on rank {peak.rank}" if peak.rank is not None else ""
    phase = f", {_WHEN.get(peak.phase, f'in phase {peak.phase}')}" if peak.phase else ""
    per = ""
    if peak.per_parameter is not None and parameters:
        per = f": {peak.per_parameter:.2f} bytes for each of {parameters:,} parameters"
    if peak.kind == "resident set":
        process = f"The largest resident set is {size(peak.bytes)}{where}: the whole process, libraries included"
        if not peak.before:
            return f"{process}."
        since = f"the {size(peak.bytes - peak.before)} since then are the model and its steps, {BESIDE}"
        return f"{process}. {size(peak.before)} of it were there before the model; {since}."
    kind = "predicted peak" if peak.kind == "predicted" else "peak"
    return f"The {kind} is {size(peak.bytes)}{where}{phase}{per}."


def comparison_sentence(comparison: Comparison) -> str:
    """The errors of total and model state, and the share without a name."""
    total, state = comparison.total, comparison.model_state
    sentence = (
        f"{comparison.moment.capitalize()} of rank {comparison.rank}: predicted {size(total.predicted)}, measured "
        f"{size(total.measured)}, an error of {signed(total.error, 1, ' %')}"
    )
    if state is not None:
        sentence += f"; of the model state {signed(state.error, 1, ' %')}"
    # Where nothing was counted but what has a name, there is no saying what has none.
    other = next((pair.measured for pair in comparison.categories if pair.name == "other"), None)
    if comparison.phases:
        sentence += f". The peak was predicted in phase {comparison.phases[0]} and measured in {comparison.phases[1]}"
    if other is not None:
        sentence += f". Without a name (other): {share(other, total.measured)}"
    return sentence + "."


def imbalance_sentence(imbalance: Imbalance) -> str:
    sentence = (
        f"Rank {imbalance.rank} holds most: a {imbalance.of} of {size(imbalance.largest)}, "
        f"{imbalance.percent:.1f} % above the mean of {size(imbalance.mean)}"
    )
    if imbalance.percent < 0.05:
        return f"All ranks hold the same: a {imbalance.of} of {size(imbalance.largest)}."
    if imbalance.category is not None and imbalance.excess is not None and imbalance.excess > 0:
        sentence += f"; furthest above its mean is {imbalance.category}, by {size(imbalance.excess)}"
    return sentence + "."


def slowest_sentence(slowest: Slowest) -> str:
    return (
        f"Rank {slowest.rank} is the slowest: what it does alone, forward passes and the waiting for their data, takes "
        f"{slowest.percent:.0f} % longer than the median of the others', which wait for it."
    )
