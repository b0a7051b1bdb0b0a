"""Records as tables for people, 80 columns wide, and the plot of growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from toolkit.bench.against import Change
from toolkit.bench.record import Record, Row, Spread, check_place, loaded
from toolkit.bench.shapes import count_text
from toolkit.console import PlainConsole
from toolkit.errors import UserError
from toolkit.records.sizes import counted, size_text

UNKNOWN = "-"
_TITLES = {
    "seconds": "ms",
    "host_seconds": "host ms",
    "step_seconds": "s a step",
    "tokens_per_s": "tokens/s",
    "wait_seconds": "wait ms",
    "pause_seconds": "pause s",
    "save_seconds": "save s",
    "load_seconds": "load s",
    "bytes_moved": "bytes",
    "of_copy": "of copy",
    "ratio": "ratio",
    "speed_ratio": "speed",
    "wait_share": "wait",
    "peak_bytes": "peak",
    "mfu": "MFU",
    "checkpoint_bytes": "size",
    "bytes_per_parameter": "B/param",
    "asked_per_s": "asked for",
    "save_bytes_per_s": "MB/s\nsaved",
    "load_bytes_per_s": "MB/s\nread",
}
_MILLISECONDS = ("seconds", "host_seconds", "wait_seconds")
_SHARES = ("of_copy", "wait_share", "mfu")
_SIZES = ("peak_bytes", "checkpoint_bytes")
_RATES_OF_BYTES = ("save_bytes_per_s", "load_bytes_per_s")
_NOT_SHOWN = {False: ("state_bytes",), True: ("state_bytes", "bytes_moved", "of_copy")}
"""By whether rows are of several places, whose columns take the room."""


def figures(value: float) -> str:
    """A number with three significant digits and no exponent."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def text_of(quantity: str, value: float) -> str:
    if quantity in _SHARES:
        return f"{100 * value:.1f} %" if value < 0.1 else f"{100 * value:.0f} %"
    if quantity in _SIZES:
        return size_text(value)
    if quantity in _RATES_OF_BYTES:
        return figures(value / 1e6)
    if quantity in _MILLISECONDS:
        return figures(1e3 * value)
    return f"{value:.2f}" if quantity in ("ratio", "speed_ratio", "bytes_moved") else figures(value)


def spread_of(spread: Spread) -> str:
    """How far the farther quartile is from the median."""
    widest = max(spread.upper - spread.median, spread.median - spread.lower)
    return f"±{100 * widest / spread.median:.0f} %"


def show(record: Record, console: PlainConsole, baseline: str | None) -> None:
    """The whole record."""
    one = record.machine
    console.print_line(
        f"{one.processor}, {one.instructions}, {one.cores} cores, {one.threads} threads"
        + ("" if one.device == "cpu" else f"; {one.device}")
        + f"; load {record.load:g}"
    )
    console.print_line(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in record.settings.items() if value))
    console.print(table(record.rows))
    for key, what in (("ratio", "time over that"), ("speed_ratio", "tokens/s over those")):
        if any(key in row.counted for row in record.rows):
            console.print_line(f"{_TITLES[key]}: {what} of {baseline}, median of the rounds' ratios.")
    for name, reason in record.left_out.items():
        console.print_line(f"left out: {name}: {reason}.")
    for note in [*record.notes, *filter(None, [loaded(record)])]:
        console.print_line(f"note: {note}")


def table(rows: Sequence[Row]) -> Table:
    """Every quantity that any of `rows` has in a column of its own."""
    timed = list(dict.fromkeys(key for row in rows for key in row.timed))
    places = list(dict.fromkeys(key for row in rows for key in row.at))
    counts = [
        key for key in dict.fromkeys(key for row in rows for key in row.counted) if key not in _NOT_SHOWN[bool(places)]
    ]
    found = Table(box=None, pad_edge=False)
    found.add_column("", overflow="fold")  # a long name is broken, no figure is cut
    for place in places:
        found.add_column(place, justify="right", no_wrap=True)
    for number, key in enumerate(timed):
        found.add_column(_TITLES.get(key, key), justify="right", no_wrap=True)
        if number == 0:
            found.add_column("spread", justify="right", no_wrap=True)
    for key in counts:
        found.add_column(_TITLES.get(key, key), justify="right", no_wrap=True)
    for row in rows:
        cells = [row.name, *(count_text(row.at[place]) if place in row.at else UNKNOWN for place in places)]
        for number, key in enumerate(timed):
            spread = row.timed.get(key)
            cells.append(UNKNOWN if spread is None else text_of(key, spread.median))
            if number == 0:
                cells.append(UNKNOWN if spread is None else spread_of(spread))
        cells += [text_of(key, row.counted[key]) if key in row.counted else UNKNOWN for key in counts]
        found.add_row(*cells)
    return found


def show_changes(changes: Sequence[Change], earlier: Record, record: Record, console: PlainConsole, file: Path) -> None:
    """What became slower, that nothing else did, and what only one of the two records has."""
    slower = [change for change in changes if change.slower]
    for change in slower:
        where = "".join(f", {count_text(value)} {key}" for key, value in change.row.at.items())
        before, now = (text_of(change.quantity, one.median) for one in (change.before, change.now))
        console.print_line(
            f"slower: {change.row.name}{where}: {_TITLES.get(change.quantity, change.quantity)} {now}, was {before} "
            f"({change.times:.2f} times as slow)"
        )
    compared = {(change.row.key, change.quantity) for change in changes}
    for words, one in ((f"{file} does not have them", record), ("they are not measured any more", earlier)):
        alone = [row for row in one.rows if any((row.key, key) not in compared for key in row.timed)]
        count = sum(len(row.timed) for row in one.rows) - len(changes)
        names = ", ".join(dict.fromkeys(row.name for row in alone))
        if count:
            console.print_line(f"not compared, since {words}: {counted(count, 'figure')}, of {names}.")
    what = f"{len(slower) or 'none'} of {counted(len(changes), 'figure')} {'are' if len(slower) > 1 else 'is'} slower"
    console.print_line(f"against {file}: {what} beyond {'their' if len(slower) > 1 else 'its'} spread.")


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises UserError where `plot` could not write `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    check_place(path, "--plot")
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    kind = path.suffix.removeprefix(".").lower()
    if kind and kind not in kinds:  # without one it is a PNG
        raise UserError(f"--plot {path} is no kind of picture that can be drawn; those are {', '.join(kinds)}.")


def plot(record: Record, path: Path) -> None:
    """Step time over parameters, and over tensors, as a PNG, SVG or PDF: straight lines are linear growth.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (by, fixed) in enumerate((("parameters", "tensors"), ("tensors", "parameters"))):
        axes = figure.add_subplot(1, 2, index + 1)
        rows = [row for row in record.rows if (row.at["tensors"] == 1) == (by == "parameters")]
        if not rows:  # there was no memory for any
            figure.delaxes(axes)
            continue
        for name in dict.fromkeys(row.name for row in rows):
            own = sorted((row for row in rows if row.name == name), key=lambda row: row.at[by])
            places, spreads = [row.at[by] for row in own], [row.timed["seconds"] for row in own]
            [line] = axes.plot(places, [1e3 * one.median for one in spreads], marker="o", markersize=3, label=name)
            low, high = [1e3 * one.lower for one in spreads], [1e3 * one.upper for one in spreads]
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2)
            if by == "tensors" and all("host_seconds" in row.timed for row in own):
                hosts = [1e3 * row.timed["host_seconds"].median for row in own]
                axes.plot(places, hosts, linestyle=":", color=line.get_color())
        value = max(row.at[fixed] for row in rows)  # what does not divide evenly is a little less
        axes.set_title(f"{count_text(value)} {fixed if value > 1 else fixed.removesuffix('s')}")
        axes.set(xscale="log", yscale="log", xlabel=by, ylabel="ms a step" + (" (dotted: the host's)" if index else ""))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"--plot {path} cannot be written: {error.strerror}.") from None
    except ValueError as error:  # a kind of file that matplotlib does not know
        raise UserError(f"--plot {path} cannot be written: {error}.") from None
