"""The sections of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from toolkit.records.categories import MEANING, in_order
from toolkit.records.memory import LargeTensor
from toolkit.records.sizes import counted, flops_text
from toolkit.report import svg
from toolkit.report.data import Explanation, RunReport, Topic
from toolkit.report.elements import Chart, Folded, Item, Kind, Preformatted, RunPart, Section, Table, legend, table
from toolkit.report.words import (
    UNKNOWN,
    batch_words,
    comparison_sentence,
    duration,
    imbalance_sentence,
    listed,
    number,
    peak_sentence,
    share,
    signed,
    size,
    slowest_sentence,
)

_STATE_MEANING = "state of the optimizer"
_SEEN = 10
"""Rows of a table that leads with what matters most; the others are folded."""
_MOST_RANKS = 32
"""More bars than this say less than the table under them."""


def run_part(run: RunReport, palette: dict[str, str]) -> RunPart:
    layout: list[tuple[str, Topic | None, list[Item]]] = [
        ("Out of memory", "out of memory", _out_of_memory(run, palette)),
        ("Over one step", None, _over_one_step(run, palette)),
        ("Loss", "training", _loss(run)),
        ("Predicted and measured", "prediction", _predicted_and_measured(run, palette)),
        ("Bytes per parameter", None, _per_parameter(run)),
        ("Ranks", "measurement", _ranks(run, palette)),
        ("Largest tensors", None, _largest_tensors(run.blocks) if run.blocks else []),
        ("What would change it", None, _changes(run)),
        ("Experts", None, _experts(run)),
        ("The run", "run", _facts(run)),
    ]
    sections = []
    for title, part, items in layout:
        problems = [problem.sentence for problem in run.problems if problem.part == part]
        if items or problems:
            sections.append(Section(title, items, problems))
    return RunPart(run.name, run.headline, _figures(run), sections, [problem.sentence for problem in run.problems])


def _figures(run: RunReport) -> list[tuple[str, str]]:
    """The few numbers to remember."""
    figures = []
    if run.peak is not None:
        names = {"allocated": "peak memory", "resident set": "resident set", "predicted": "predicted peak"}
        name, count = names[run.peak.kind], run.peak.bytes
        if run.peak.kind == "resident set" and run.held is not None:
            name, count = "held by the model", run.held
        figures.append((name, size(count)))
        if run.facts.parameters and name != "resident set":
            figures.append(("bytes per parameter", number(count / run.facts.parameters)))
    if run.predicted_peak is not None and run.peak is not None and run.peak.kind == "resident set":
        figures.append(("predicted peak", size(run.predicted_peak)))
    at_peak = [comparison for comparison in run.comparisons if comparison.moment == "at the peak"]
    if at_peak:
        figures.append(("error of the prediction", signed(at_peak[0].total.error, 1, " %")))
    if run.training is not None:
        figures.append(("training loss", number(run.training.loss, 4)))
        figures.append(("tokens per second", number(run.training.tokens_per_s, 0)))
        if run.training.mfu is not None:
            figures.append(("MFU", f"{run.training.mfu:.1%}"))
    return figures


def _over_one_step(run: RunReport, palette: dict[str, str]) -> list[Item]:
    items: list[Item] = []
    if run.timeline is not None:
        of = run.timeline
        step = f", step {of.step}" if of.step is not None else ""
        sentence = f"Measured on rank {of.rank}{step}." if of.measured else "Predicted; nothing was traced."
        caption = "" if of.timeline.milliseconds is not None else "From left to right is order, not time."
        reference = run.predicted_peak if of.measured else None
        if reference:
            caption = f"{caption} The dashed line is the predicted peak, {size(reference)}.".strip()
        drawing = svg.timeline(of.timeline, palette, "Memory over one training step by category", reference)
        names = [name for name, values in of.timeline.held.items() if any(values)]
        items = [sentence, Chart(drawing, legend(names, palette)[::-1], caption)]
    if run.phases:
        rows = [[one.name, size(one.predicted), size(one.measured), size(one.resident_set)] for one in run.phases]
        reserved = "reserved" if any(rank.reserved is not None for rank in run.ranks) else "resident set"
        columns: list[tuple[str, Kind]] = [("Peak of phase", "text"), ("predicted", "number"), ("measured", "number")]
        items.append(table([*columns, (reserved, "number")], rows))
    return items


def _predicted_and_measured(run: RunReport, palette: dict[str, str]) -> list[Item]:
    items: list[Item] = []
    for comparison in run.comparisons:
        items.append(comparison_sentence(comparison))
        if not comparison.categories:
            continue
        if comparison.moment == "at the peak":
            both = [
                (label, {pair.name: getattr(pair, label) for pair in comparison.categories})
                for label in ("predicted", "measured")
            ]
            items.append(Chart(svg.bars(both, palette, "Predicted and measured peak by category")))
        pairs = [*comparison.categories, comparison.total]
        rows = [[pair.name, size(pair.predicted), size(pair.measured), signed(pair.error, 1, " %")] for pair in pairs]
        moment = comparison.moment.capitalize()
        columns: list[tuple[str, Kind]] = [(moment, "category"), ("predicted", "number"), ("measured", "number")]
        items.append(table([*columns, ("error", "number")], rows, True))
    if run.context:
        items.append(f"Outside torch's allocator come {size(run.context)} of CUDA context, by prediction.")
    if run.host and not any(comparison.moment == "in host memory" for comparison in run.comparisons):
        offloaded = ", ".join(f"{name} {size(count)}" for name, count in in_order(run.host).items())
        items.append(f"In host memory, by prediction: {offloaded}; {size(sum(run.host.values()))} together.")
    if run.nvme:
        items.append(f"On NVMe, by prediction: {size(run.nvme)}.")
    if run.per_block:
        blocks = listed([f"{size(count)} ({name})" for name, count in run.per_block.items()])
        items.append(f"Activations of one transformer block, by prediction: {blocks}.")
    return items + list(run.remarks)


def _per_parameter(run: RunReport) -> list[Item]:
    if not run.per_parameter:
        return []
    whole = [sum(row.peak for row in run.per_parameter), sum(row.resident or 0 for row in run.per_parameter)]
    known = any(row.resident is not None for row in run.per_parameter)
    rows = [
        [
            row.category,
            number(row.peak_per_parameter, 3),
            size(row.peak),
            number(row.resident_per_parameter, 3),
            size(row.resident),
            MEANING.get(row.category, _STATE_MEANING),
        ]
        for row in run.per_parameter
    ]
    count = run.facts.parameters
    totals = [number(total / count if count else None, 3) for total in whole]
    last = [totals[1], size(whole[1])] if known else [UNKNOWN, UNKNOWN]
    rows.append(["total", totals[0], size(whole[0]), *last, ""])
    columns: list[tuple[str, Kind]] = [
        ("Category", "category"),
        ("per parameter at the peak", "number"),
        ("at the peak", "number"),
        ("per parameter between steps", "number"),
        ("between steps", "number"),
        ("What it is", "prose"),
    ]
    of = f" over the {count:,} parameters of the whole model" if count else ""
    kind = "measured on the largest rank" if any(rank.held for rank in run.ranks) else "predicted"
    return [f"Bytes of one rank{of}, {kind}.", table(columns, rows, True)]


def _ranks(run: RunReport, palette: dict[str, str]) -> list[Item]:
    items: list[Item] = []
    if run.imbalance is not None:
        items.append(imbalance_sentence(run.imbalance))
    if 1 < len(run.ranks) <= _MOST_RANKS and all(rank.held for rank in run.ranks):
        peaks = [(f"rank {rank.rank}", rank.held) for rank in run.ranks]
        names = {name for rank in run.ranks for name in rank.held}
        items.append(Chart(svg.bars(peaks, palette, "Peak of each rank by category"), legend(names, palette)))
    rows = [
        [
            str(rank.rank),
            size(rank.peak),
            rank.phase or "",
            size(rank.resident),
            size(rank.resident_set),
            size(rank.limit),
            size(rank.reserved),
            UNKNOWN if rank.fragmentation is None else f"{100 * rank.fragmentation:.1f} %",
            rank.device,
            rank.host,
        ]
        for rank in run.ranks
    ]
    columns: list[tuple[str, Kind]] = [
        ("Rank", "number"),
        ("peak", "number"),
        ("in phase", "text"),
        ("between steps", "number"),
        ("resident set", "number"),
        ("limit", "number"),
        ("reserved", "number"),
        ("fragmented", "number"),
        ("device", "text"),
        ("host", "text"),
    ]
    if rows:
        items.append(table(columns, rows))
    if run.peak is not None and run.peak.kind == "resident set" and run.held is not None:
        items.append(peak_sentence(run.peak, run.facts.parameters))
    if run.measuring:
        items.append(run.measuring)
    return items


def _largest_tensors(tensors: Sequence[LargeTensor]) -> list[Item]:
    # One operation in every layer makes as many tensors alike: they are one line.
    alike = Counter((size(one.bytes), one.category, one.what, one.where, one.phase) for one in tensors)
    rows = [[first, f"× {count}" if count > 1 else "", *rest] for (first, *rest), count in alike.items()]
    columns: list[tuple[str, Kind]] = [
        ("Size", "number"),
        ("times", "number"),
        ("category", "category"),
        ("what", "code"),
        ("allocated in", "code"),
        ("phase", "text"),
    ]
    return _first_seen(table(columns, rows))


def _first_seen(whole: Table) -> list[Item]:
    rest = whole.rows[_SEEN:]
    first: list[Item] = [Table(whole.columns, whole.rows[:_SEEN])]
    return [*first, Folded(f"{len(rest)} more", Table(whole.columns, rest))] if rest else first


def _changes(run: RunReport) -> list[Item]:
    if not run.changes:
        return []
    rows = [[change.change, size(change.saves), size(change.peak)] for change in run.changes]
    before = size(run.predicted_peak)
    intro = f"Predicted, one setting at a time, against the predicted peak of {before}; − is more memory."
    return [intro, table([("Setting", "code"), ("saves", "number"), ("peak", "number")], rows)]


def _out_of_memory(run: RunReport, palette: dict[str, str]) -> list[Item]:
    items: list[Item] = []
    for explained in run.out_of_memory:
        items += _explained(explained, palette)
    return items


def _explained(explained: Explanation, palette: dict[str, str]) -> list[Item]:
    record = explained.record
    if record is None:
        return [f"What rank {explained.rank} wrote:", Preformatted(explained.text or "")]
    step = f" of step {record.step}" if record.step is not None else ""
    asked = f"asked for {size(record.asked)} more" if record.asked is not None else "asked for more"
    limit = f" of the {size(record.limit)} it may have" if record.limit is not None else ""
    held = in_order(record.held)
    total = sum(held.values())
    items: list[Item] = [
        f"Rank {record.rank}, in phase {record.phase}{step}, held {size(total)}{limit} and {asked}.",
        Preformatted(record.message),
    ]
    if held:
        items.append(Chart(svg.bars([(f"rank {record.rank} held", held)], palette, "Held when memory ran out")))
        rows = [[name, size(count), share(count, total)] for name, count in held.items()]
        items.append(table([("Held", "category"), ("size", "number"), ("share", "number")], rows))
    if record.blocks:
        items += _largest_tensors(record.blocks)
    if record.changes:
        rows = [[change.change, size(change.saves)] for change in sorted(record.changes, key=lambda one: -one.saves)]
        items += ["What would save most:", table([("Setting", "code"), ("saves", "number")], rows)]
    return items


def _loss(run: RunReport) -> list[Item]:
    training = run.training
    if training is None:
        return []
    steps = counted(training.steps, "step")
    if run.facts.steps:
        steps = f"{training.steps:,} of {counted(run.facts.steps, 'step')}"
    tokens = f", {counted(training.tokens, 'token')}" if training.tokens else ""
    compiling = f" after {duration(training.compile_s)} of compiling" if training.compile_s else ""
    validated = "" if training.val_loss is None else f", validation loss {number(training.val_loss, 4)}"
    state = "" if training.complete else " The run did not finish."
    sentence = (
        f"{steps}{tokens} in {duration(training.seconds)}{compiling}; training loss "
        f"{number(training.loss, 4)} (mean of the last {training.loss_steps}){validated}.{state}"
    )
    if training.skipped_steps:
        sentence += f" Skipped for a gradient that is not finite: {training.skipped_steps}."
    if training.flops_per_s is not None:
        mfu = f", {training.mfu:.1%} of what the devices can do (MFU)" if training.mfu is not None else ""
        sentence += f" Speed of the median step: {flops_text(training.flops_per_s)} of the model's own arithmetic{mfu}."
    if training.waiting is not None:
        sentence += f" Waiting for data took {training.waiting:.2%} of the steps' time."
    if training.slowest is not None:
        sentence += f" {slowest_sentence(training.slowest)}"
    curve = training.curve
    series = [svg.Series("training", curve.steps, curve.loss, 0)]
    legend = [svg.dash(0, "training")]
    if curve.val_steps:
        series.append(svg.Series("validation", curve.val_steps, curve.val_loss, 1, points=True))
        legend.append(Markup('<span class="key"><i class="ring"></i>validation</span>'))
    ends = [f"{number(curve.loss[end], 4)} at step {curve.steps[end]}" for end in (0, -1)]
    about = f"From {ends[0]} to {ends[1]}."
    drawing = svg.lines(series, "Loss over optimizer steps, nats per token", about)
    return [sentence, Chart(drawing, legend)] if drawing else [sentence]


def _experts(run: RunReport) -> list[Item]:
    layers = run.training.experts if run.training is not None else []
    if not layers:
        return []
    rows = [
        [one.layer, number(one.busiest), number(one.idlest), number(one.evenness, 3), number(one.unused, 1)]
        for one in sorted(layers, key=lambda one: -one.busiest)
    ]
    columns: list[tuple[str, Kind]] = [("Layer", "text"), ("busiest expert", "number"), ("idlest expert", "number")]
    whole = [*columns, ("evenness", "number"), ("experts without a token", "number")]
    sentence = (
        f"How tokens were shared out among the experts of each layer, in a mean step of the last {layers[0].over}: a "
        "load of 1 is an even share, an evenness of 1 is all experts alike, and an expert without a token learns "
        "nothing in that step."
    )
    return [sentence, *_first_seen(table(whole, rows))]


def _facts(run: RunReport) -> list[Item]:
    facts = run.facts
    batch = [facts.micro_batch, facts.gradient_accumulation, facts.world_size]
    words = {
        "model": facts.model,
        "parameters": facts.parameters and f"{facts.parameters:,}",
        "optimizer": facts.optimizer,
        "state format": facts.state_format,
        "weights": facts.weights,
        "ZeRO stage": facts.stage,
        "offload": ", ".join(facts.offload),
        "batch": " × ".join(map(str, batch)) + " (micro-batch × accumulation × ranks)" if None not in batch else None,
        "global batch": batch_words(run),
        "sequence length": facts.seq_len,
        "learning rate": facts.learning_rate,
        "betas": facts.betas and ", ".join(map(str, facts.betas)),
        "weight decay": facts.weight_decay,
        "gradient clipping": facts.clipping,
        "scheduler": facts.scheduler,
        "warm-up": facts.warmup and counted(facts.warmup, "step"),
        "activations": facts.activations,
        "loss": facts.loss,
        "data": facts.data,
        "seed": facts.seed,
        "device": facts.device,
        "started": facts.started,
        "resumed": "; ".join(
            f"before step {one.first:,}: {', '.join(one.changed)}"
            for one in (run.training.changes if run.training else [])
        ),
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        "folder": run.folder,
    }
    rows = [[name, str(word)] for name, word in words.items() if word not in (None, "")]
    return [Table([("", "text"), ("", "prose")], rows)]
