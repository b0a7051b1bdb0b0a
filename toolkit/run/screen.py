"""What rank 0 shows: a progress bar on a terminal, plain lines elsewhere, and a summary at the end."""

from __future__ import annotations

import math
import shlex
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from toolkit.console import PlainConsole
from toolkit.printable import printable
from toolkit.records.memory import BESIDE
from toolkit.records.memory import FOLDER as MEMORY
from toolkit.records.run import CHECKPOINTS, EVENTS, LAST_STEPS, METRICS, PLOT, tokens_of
from toolkit.records.sizes import counted, flops_text, size_text
from toolkit.usage import to_type

# Where there is no terminal for a progress bar: about so many lines, but one at least every so many steps.
PLAIN_LINES = 24
PLAIN_STEPS = 50


class _Bar(Progress):
    """The bar, and below it the figures of the latest step: as many side by side as the terminal has room for."""

    figures: tuple[str, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Columns([Text(printable(figure)) for figure in self.figures], padding=(0, 2))


class Screen:
    """Progress of a run of `steps` steps; `shown` is false on every rank but 0. Use as a context manager."""

    def __init__(self, steps: int, *, shown: bool, console: Console | None = None) -> None:
        self.console = console or PlainConsole(quiet=not shown)
        self._drawn = shown and self.console.is_terminal
        # Where none is drawn, it still counts the time.
        self._bar = _Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            *(TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn()),
            console=self.console,
            disable=not self._drawn,
            # From the mean of all steps but the first, which is slower than the others, and however long one takes.
            speed_estimate_period=math.inf,
        )
        self._task = self._bar.add_task("train", total=steps, start=False)
        self._losses: deque[float] = deque(maxlen=LAST_STEPS)
        self._tokens = 0
        self._limit: int | None = None
        self.expect(steps)

    def expect(self, steps: int) -> None:
        """Before the first step: the run has `steps` steps, which where it is resumed may not be those asked for."""
        self._steps = steps
        self._every = min(max(1, steps // PLAIN_LINES), PLAIN_STEPS)
        self._bar.update(self._task, total=steps)

    def go_on(self, records: Iterable[Mapping[str, Any]], limit: int | None) -> None:
        """Before the first step: `records` of those made earlier, and how many bytes a rank may hold, where known."""
        self._limit = limit
        for record in records:
            self._count(record)

    def _count(self, record: Mapping[str, Any]) -> None:
        self._tokens += tokens_of(record)
        if record["loss"] is not None:
            self._losses.append(record["loss"])

    def __enter__(self) -> Screen:
        self._bar.start_task(self._task)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        """One line above the progress bar."""
        self.console.print(printable(message), markup=False, emoji=False, soft_wrap=True)

    def step(self, record: Mapping[str, Any], reported: Iterable[str] = ()) -> None:
        """Show one line of the metrics; `reported` names what is in it from the rule."""
        step = record["step"]
        where = f"step {step:>{len(str(self._steps))}}/{self._steps}"
        self._count(record)
        figures = tuple(self._figures(record, reported))
        self._bar.figures = figures
        self._bar.update(self._task, completed=step)
        plain = step % self._every == 0 or step in (1, self._steps) or record.get("skipped")
        if plain and not self._drawn:
            [task] = self._bar.tasks
            took, left = (_clock(seconds) for seconds in (task.elapsed, task.time_remaining))
            self.say("  ".join([where, f"{took} < {left}", *figures]))
        if "val_loss" in record:
            self.say(f"{where}  validation loss {_figure(record['val_loss'])}")

    def _figures(self, record: Mapping[str, Any], reported: Iterable[str]) -> Iterable[str]:
        smoothed = statistics.fmean(self._losses) if self._losses else None
        yield f"loss {_figure(record['loss'])} (last {len(self._losses)}: {_figure(smoothed)})"
        if "grad_norm" in record:
            yield f"grad norm {_figure(record['grad_norm'])}"
        yield f"lr {record['lr']:.2e}"
        yield from (f"{name} {_figure(record[name])}" for name in reported)
        yield f"{record['tokens_per_s']:,.0f} tok/s"
        yield _arithmetic(record)
        if "memory_bytes" in record:
            of = f" of {size_text(self._limit)}" if self._limit is not None else ""
            yield f"memory {size_text(record['memory_bytes'])}{of}"
        yield f"{self._tokens:,} tokens"
        if record.get("skipped"):
            yield "(skipped: the gradient is not finite)"

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The table at the end of a run; `summary` is what summary.json holds."""
        title = "Run interrupted" if summary["interrupted"] else "Run finished"
        table = Table(show_header=False, title=title, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        validation = summary["val_loss"]
        folder = Path(summary["run_dir"])
        files = [name for name in (METRICS, PLOT, MEMORY, CHECKPOINTS, EVENTS) if (folder / name).exists()]
        compiling = f", after {summary['compile_s']:.0f} s of compiling" if summary["compile_s"] else ""
        rows = {
            "files": ": ".join(filter(None, [summary["run_dir"], ", ".join(files)])),
            "steps": f"{summary['steps']} ({summary['tokens']:,} tokens in {summary['seconds']:.0f} s{compiling})",
            "training loss": f"{_figure(summary['loss'])} ({'mean ' if summary['loss_steps'] > 1 else ''}of the last "
            f"{'step' if summary['loss_steps'] == 1 else counted(summary['loss_steps'], 'step')})",
            "validation loss": "not measured" if validation is None else _figure(validation),
            "speed": ", ".join(filter(None, [f"{summary['tokens_per_s']:,.0f} tokens/s", _arithmetic(summary)])),
            "  waiting for data": f"{summary['data_seconds'] / summary['seconds']:.2%} of the time",
            **(_measured(summary) if "peak_memory_bytes" in summary else {"peak memory": "not known any more"}),
        }
        for name, value in rows.items():
            table.add_row(name, Text(printable(value)))
        self.console.print(table)
        run = shlex.quote(summary["run_dir"])
        following = [f"toolkit report {run}"]
        if CHECKPOINTS in files:
            following += [f'toolkit sample {run} "The"', f"toolkit eval {run}", f"toolkit export {run} --out exported"]
        if summary["interrupted"]:
            self.say(f"to continue: the same command, with --run-dir {run}")
        for line in ("next:", *(f"  {to_type(command)}" for command in following)):
            self.say(line)


def _measured(summary: Mapping[str, Any]) -> dict[str, str]:
    """What `toolkit.run.summary.Measured` has, by the name of a row."""
    predicted, by_name = summary["predicted_peak_bytes"], summary["state_bytes_by_name"].items()
    trained = summary.get("trained_parameters")
    per = "per trained parameter" if trained is not None and trained != summary["parameters"] else "per parameter"
    alone = ", of the model and its steps alone" if summary["process_bytes"] else ""
    rows = {
        "peak memory": f"{size_text(summary['peak_memory_bytes'])} {summary['memory_kind']}, largest rank",
        **_of_process(summary),
        "  predicted peak": "not known" if predicted is None else f"{size_text(predicted)}{alone}",
        "optimizer state": f"{summary['state_bytes_per_parameter']:.2f} bytes {per}, "
        f"{summary['state_bytes_per_parameter_per_rank']:.2f} of them on each rank",
        "  of rank 0": ", ".join(f"{name} {size_text(count)}" for name, count in by_name),
    }
    if count := summary["skipped_documents"]:
        some = " ".join(summary["skipped_documents_first"])
        rows["skipped"] = f"{counted(count, 'document')} that cannot be used, the first: {some}"
    if summary["replaced_characters"]:
        rows["replaced"] = (
            f"{counted(summary['replaced_characters'], 'character')} of the text, which its encoding does not have"
        )
    if count := summary["cut_conversations"]:
        is_or_are, ends = ("is", "its end") if count == 1 else ("are", "their end")
        rows["cut"] = f"{counted(count, 'conversation')} that {is_or_are} longer than --seq-len, at {ends}"
    return rows


def _of_process(summary: Mapping[str, Any]) -> dict[str, str]:
    """On a CPU, of which parts the peak of a process is, by the name of a row."""
    if not (process := summary["process_bytes"]):
        return {}
    since = size_text(summary["peak_memory_bytes"] - process)
    rows = {
        "  before the model": size_text(process),
        "  since then": f"{since}: the model and its steps, {BESIDE}",
    }
    if (counted := summary.get("counted_peak_bytes")) is not None:
        rows["  counted peak"] = f"{size_text(counted)}, of the model and its steps alone, in the traced step"
    return rows


def _arithmetic(of: Mapping[str, Any]) -> str:
    """Empty of steps of an older version, which did not write it."""
    if of["flops_per_s"] is None:
        return ""
    mfu = f" (MFU {of['mfu']:.1%})" if of.get("mfu") is not None else ""
    return flops_text(of["flops_per_s"]) + mfu


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
