"""Estimates and plans on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich.table import Table

from toolkit.console import PlainConsole
from toolkit.estimate.prices import DEFAULT_FORMAT, EXACT_FORMAT, missed_bound
from toolkit.estimate.recommend import MARGIN, Candidate
from toolkit.optim import Rule, find_rule
from toolkit.records import categories as c
from toolkit.records.activations import FLAG
from toolkit.records.memory import Prediction
from toolkit.records.sizes import size_text

_ATTENTION = {"sdpa": "flash"}
"""transformers' names in the words of `--attention`."""

SPARE = f"{100 * MARGIN:.0f} %"

_WIDE = 120
"""Columns that a table of candidates may take on any terminal: lines are continued below, figures are not cut."""

_SHOWN = 12
"""Candidates of a plan that fit, and that do not, at most."""


def show_prediction(
    console: PlainConsole, found: Prediction, variants: Mapping[str, int], memory: int | None, total_ranks: str
) -> None:
    """The table of one rank, what holds the peak, and whether it fits."""
    s = found.setup
    attention = _ATTENTION.get(s.attention, s.attention)
    console.print_line(
        f"{s.model}: {s.parameters:,} parameters; {s.optimizer}, state {s.state_format}, weights {s.weights}, ZeRO "
        f"{s.stage}{' + offload of ' + ' and '.join(s.offload) if s.offload else ''}; {total_ranks}",
    )
    console.print_line(
        f"micro-batch {s.micro_batch} x {s.seq_len} tokens, accumulation {s.gradient_accumulation}, activations "
        f"{s.activations}, {attention} attention, {s.loss} loss",
    )
    at_peak = found.at_peak()
    table = Table("per rank", box=None, title_justify="left")
    table.add_column("at the peak", justify="right")
    table.add_column("between steps", justify="right")
    table.add_column("bytes a parameter", justify="right")
    for category in c.ordered({*at_peak, *found.resident}):
        size = at_peak.get(category, 0)
        resident = found.resident.get(category, 0)
        table.add_row(category, _size(size), _size(resident), f"{size / s.parameters:.2f}" if size else "-")
    total = sum(found.resident.values())
    if found.context:
        table.add_row(c.CONTEXT, size_text(found.context), size_text(found.context), "assumed")
    sums = [size_text(amount + found.context) for amount in (found.peak, total)]
    table.add_row("all", *sums, f"{found.needed / s.parameters:.2f}", style="bold")
    console.print(table)
    peaks = ", ".join(f"{phase.name} {size_text(phase.peak or 0)}" for phase in found.phases)
    apart = f"; without the {c.CONTEXT}" if found.context else ""
    console.print_line(f"the peak lies in the phase {found.peak_phase} ({peaks}{apart})")
    for title, sizes in (("host memory of a rank", found.host), ("NVMe of a rank", found.nvme)):
        if any(sizes.values()):
            parts = ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items())
            console.print_line(f"{title}: {size_text(sum(sizes.values()))} ({parts})")
    if found.sent:
        console.print_line(f"sent for whole matrices in a step: {size_text(found.sent)} (fp32, to owners and back)")
    if found.wire:
        parts = ", ".join(f"{kind} {size_text(size)}" for kind, size in found.wire.items())
        console.print_line(f"collectives in a step, what each rank puts in: {parts}")
    elif found.wire is None:
        console.print_line(f"collectives in a step: not predicted for {s.optimizer}; runs count them")
    if variants:
        loss = ", and of the loss" if len(variants) > 2 else ""
        console.print_line(f"activations of one transformer block{loss} (kept: until its backward pass):")
        for name, size in variants.items():
            console.print_line(f"  {name}: {size_text(size)}")
    if found.changes:
        console.print_line(f"what would change the peak{', context left out' if found.context else ''}:")
        for change in found.changes:
            console.print_line(
                f"  {change.change}: {size_text(change.peak)} ({_signed(-change.saves)})",
            )
    for remark in found.remarks:
        console.print_line(f"note: {remark}")
    if memory is not None:
        console.print_line(verdict(found, memory), style="bold")


def verdict(found: Prediction, memory: int) -> str:
    """Whether it fits, and by how much."""
    needs = found.needed
    if needs <= memory:
        return f"fits: {size_text(needs)} of {size_text(memory)}, {size_text(memory - needs)} to spare."
    return f"does not fit: {size_text(needs)} needed, {size_text(memory)} there, {size_text(needs - memory)} too much."


def show_candidates(
    console: PlainConsole, found: Sequence[Candidate], memory: int, seq_len: int, optimizer: str, host: str
) -> None:
    """Candidates in order, and why the others do not fit.

    Args:
        found: as `toolkit.estimate.recommend.plan` orders them.
        memory: bytes of the device.
        host: what host memory they were held against, in words.
    """
    where = f"in {size_text(memory)} at {seq_len} tokens a sequence"
    fitting = [one for one in found if one.fits]
    asked, smaller = [one for one in fitting if one.asked], [one for one in fitting if not one.asked]
    if asked:
        but = ", not counting the disk" if any(one.disk for one in asked) else ""
        _rows(console, f"fits {where}, the fastest first{but}:", asked, found[0].cost, optimizer)
    if smaller:
        names = " or ".join(dict.fromkeys(one.state_format for one in smaller))
        title = f"fits with smaller state, which is not recommended unless asked for (--state-format {names}):"
        _rows(console, title, smaller, found[0].cost, optimizer)
    close = [one for one in found if one.close]
    if close:
        title = f"fits too closely to be recommended, with less than {SPARE} of the GPU or of the host to spare:"
        _rows(console, title, close, found[0].cost, optimizer)
    shown = [*fitting, *close]
    if shown:
        notes = (
            f"released: release_gradients; keeps: {FLAG}; batch: sequences of a pass; "
            "device: peak of a GPU; host: memory of one machine; time: assumed, relative"
        )
        if any(one.disk for one in shown):
            notes += ", without that of the disk; disk: of one machine, all of which each step reads and writes"
        if rule := find_rule(optimizer):
            measured = f"of an update of {optimizer}, against fp32 state"
            notes += f"; error: {measured if rule.rule.update_error else 'not measured'}"
            if said := prices(rule.rule, {one.state_format for one in shown}):
                notes += f"; {PRICED}: {said}"
        console.print_line(notes)
    failed = [one for one in found if not (one.fits or one.close)]
    if failed:
        console.print_line(f"does not fit {where}, with one sequence:")
        for one in failed[:_SHOWN]:
            state = f"{one.state}, {one.activations}"
            lacks = f"{size_text(one.needs)}, {size_text(one.needs - memory)} too much; most: {one.holds_most}"
            if one.needs <= memory:
                lacks = f"{size_text(one.host)} of host memory"
            console.print_line(f"  {one.config} ({state}): {lacks}")
        if len(failed) > _SHOWN:
            console.print_line(f"  and {len(failed) - _SHOWN} more.")
    if any(one.host for one in found):
        console.print_line(f"what takes host memory is held against {host}, less {SPARE}")


PRICED = "validation loss beside that of fp32 state (small models, ± 2 standard errors)"


def prices(rule: type[Rule], formats: Collection[str]) -> str:
    """What those of `formats` were measured to add to the loss; an empty string where there is nothing to say."""
    said = [_price(rule, name) for name in rule.loss_price if name in formats]
    if DEFAULT_FORMAT in formats and DEFAULT_FORMAT not in rule.loss_price:
        said.insert(0, f"{DEFAULT_FORMAT} not measured")
    return ", ".join(said)


def _price(rule: type[Rule], state_format: str) -> str:
    more, error = rule.loss_price[state_format]
    bound = missed_bound(rule, state_format)
    return f"{state_format} {more:+.3f} ± {error:.3f}" + (f", above its bound of {bound:g}" if bound else "")


def _rows(console: PlainConsole, title: str, shown: Sequence[Candidate], fastest: float, optimizer: str) -> None:
    rule = find_rule(optimizer)
    on_disk = any(one.disk for one in shown)
    table = Table("config", "state, weights", "keeps", box=None, pad_edge=False)
    for heading in ("batch", "device", "host", *(["disk"] if on_disk else []), "time", *(["error"] if rule else [])):
        table.add_column(heading, justify="right")
    table.columns[0].overflow = "fold"  # a long name is broken, no figure is cut
    for column in table.columns[1:]:
        column.no_wrap = True
    errors = {EXACT_FORMAT: 0.0, **(rule.rule.update_error if rule else {})}
    for one in shown[:_SHOWN]:
        error = errors.get(one.state_format)
        table.add_row(
            *(one.config, one.state, str(one.activations), str(one.micro_batch)),
            *(size_text(one.needs), _size(one.host), *([_size(one.disk)] if on_disk else [])),
            f"{one.cost / fastest:.2f}",
            *(["?" if error is None else f"{error} %"] if rule else []),
        )
    console.print_line(title)
    width = console.width
    console.width = max(width, _WIDE)
    console.print(table)
    console.width = width
    if len(shown) > _SHOWN:
        console.print_line(f"and {len(shown) - _SHOWN} more.")


def _size(count: int) -> str:
    return size_text(count) if count else "-"


def _signed(count: int) -> str:
    return ("+" if count > 0 else "-") + size_text(abs(count))
