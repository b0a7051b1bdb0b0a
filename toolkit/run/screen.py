"""What rank 0 shows: a progress bar on a terminal, plain lines elsewhere, and a summary at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from toolkit.console import PlainConsole
from toolkit.printable import printable
from toolkit.records.sizes import flops_text, size_text

# Where there is no terminal for a progress bar: about so many lines, but one at least every so many steps.
PLAIN_LINES = 24
PLAIN_STEPS = 50


class Screen:
    """Progress of a run of `steps` steps; `shown` is false on every rank but 0. Use as a context manager."""

    def __init__(self, steps: int, *, shown: bool, console: Console | None = None) -> None:
        self.console = console or PlainConsole(quiet=not shown)
        self._bar: Progress | None = None
        self.expect(steps)
        if shown and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeRemainingColumn(),
                console=self.console,
                # From the mean of all steps but the first, which is slower than the others, and however long one takes.
                speed_estimate_period=math.inf,
            )
            self._task = self._bar.add_task("train", total=steps, figures="")

    def expect(self, steps: int) -> None:
        """Before the first step: the run has `steps` steps, which where it is resumed may not be those asked for."""
        self._steps = steps
        self._every = min(max(1, steps // PLAIN_LINES), PLAIN_STEPS)
        if self._bar is not None:
            self._bar.update(self._task, total=steps)

    def __enter__(self) -> Screen:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """One line above the progress bar."""
        self.console.print(printable(message), markup=False, emoji=False, soft_wrap=True)

    def step(self, record: Mapping[str, Any], reported: Iterable[str] = ()) -> None:
        """Show one line of the metrics; `reported` names what is in it from the rule."""
        step = record["step"]
        where = f"step {step:>{len(str(self._steps))}}/{self._steps}"
        figures = f"loss {_figure(record['loss'])}  lr {record['lr']:.2e}  "
        figures += "".join(f"{name} {_figure(record[name])}  " for name in reported)
        figures += f"{record['tokens_per_s']:,.0f} tok/s  {_arithmetic(record)}"
        if record.get("skipped"):
            figures += "  (skipped: the gradient is not finite)"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=printable(figures))
        elif step % self._every == 0 or step in (1, self._steps) or record.get("skipped"):
            self.say(f"{where}  {figures}")
        if "val_loss" in record:
            self.say(f"{where}  validation loss {_figure(record['val_loss'])}")

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The table at the end of a run; `summary` is what summary.json holds."""
        title = "Run interrupted" if summary["interrupted"] else "Run finished"
        table = Table(show_header=False, title=title, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        validation = summary["val_loss"]
        peak = size_text(summary["peak_memory_bytes"])
        more = ", Python and libraries included" if summary["memory_kind"] == "resident" else ""
        by_name = summary["state_bytes_by_name"].items()
        compiling = f", after {summary['compile_s']:.0f} s of compiling" if summary["compile_s"] else ""
        rows = {
            "files": summary["run_dir"],
            "steps": f"{summary['steps']} ({summary['tokens']:,} tokens in {summary['seconds']:.0f} s{compiling})",
            "training loss": f"{_figure(summary['loss'])} (mean of the last {summary['loss_steps']} steps)",
            "validation loss": "not measured" if validation is None else _figure(validation),
            "speed": f"{summary['tokens_per_s']:,.0f} tokens/s, {_arithmetic(summary)}",
            "  waiting for data": f"{summary['data_seconds'] / summary['seconds']:.2%} of the time",
            "peak memory": f"{peak} {summary['memory_kind']}, largest rank{more}",
            "  records": summary["memory_files"] or "none: --memory-profile off",
            "optimizer state": f"{summary['state_bytes_per_parameter']:.2f} bytes per parameter, "
            f"{summary['state_bytes_per_parameter_per_rank']:.2f} of them on each rank",
            "  of rank 0": ", ".join(f"{name} {size_text(count)}" for name, count in by_name),
        }
        if count := summary["skipped_documents"]:
            some = " ".join(summary["skipped_documents_first"])
            documents = "document" if count == 1 else "documents"
            rows["skipped"] = f"{count:,} {documents} that cannot be used, the first: {some}"
        if summary["replaced_characters"]:
            rows["replaced"] = (
                f"{summary['replaced_characters']:,} characters of the text, which its encoding does not have"
            )
        if summary["cut_conversations"]:
            rows["cut"] = f"{summary['cut_conversations']:,} conversations that are longer than --seq-len, at their end"
        for name, value in rows.items():
            table.add_row(name, Text(printable(value)))
        self.console.print(table)


def _arithmetic(of: Mapping[str, Any]) -> str:
    mfu = f" (MFU {of['mfu']:.1%})" if of.get("mfu") is not None else ""
    return flops_text(of["flops_per_s"]) + mfu


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
