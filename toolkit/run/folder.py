"""A run's folder: claimed once, then metrics.jsonl line by line, and a summary and a plot at the end.

Files: run.json (settings, batch, versions), ds_config.json (the DeepSpeed JSON as used), metrics.jsonl (one
line per optimizer step), summary.json, loss.png, checkpoints/ (`toolkit.checkpoint.store`), memory/
(`toolkit.records.memory`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.masking import masked
from toolkit.paths import check_writable, read_text, replace_text
from toolkit.records.memory import FOLDER as MEMORY
from toolkit.records.run import (
    CHECKPOINTS,
    CONFIG,
    CUT,
    EVENTS,
    METRICS,
    PLOT,
    RUN,
    SUMMARY,
    is_step_line,
    parse_metrics,
    strict,
)
from toolkit.usage import to_type

# As style.css of the reports has them on paper.
_LINES, _QUIET, _RULE = ("#17478a", "#c2570c"), "#5b626d", "#dfe2e7"
LIBRARIES = ("leanstate", "torch", "deepspeed", "transformers", "datasets")


def default_folder(model: str, config: str) -> Path:
    """``runs/<model>-<config>-<time>``, with a counter where that second already has a run."""
    name = f"{Path(model).name}-{Path(config).name.removesuffix('.json')}-{datetime.now():%Y%m%d-%H%M%S}"
    base = Path("runs") / re.sub(r"[^\w.-]+", "-", name)
    folder, count = base, 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder


def check_free(folder: Path, *, resuming: bool = False) -> None:
    """Raise UserError if `folder` cannot hold a run, or holds a run that must not be continued.

    `resuming`: the folder may hold a run that keeps checkpoints.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the run folder {folder} is a file; give --run-dir a folder.")
    existing = next((name for name in (METRICS, RUN) if (folder / name).exists()), None)
    if existing is None or (resuming and (folder / CHECKPOINTS).is_dir()):
        return
    why = "which keeps no checkpoints to resume from" if resuming else "and --resume is none"
    shows = to_type(f"toolkit report {shlex.quote(str(folder))}")
    held = f"the run folder {folder} already holds a run ({existing}), {why}"
    raise UserError(f"{held}; give another --run-dir ({shows} shows this one).")


class RunFolder:
    """The folder of one run, open on rank 0; no other process can take it until `close`.

    Args:
        folder: created if missing.
        run: what run.json says about the run, if it is a new one.
        config: the DeepSpeed JSON as used.
        checkpoints: whether the run keeps any; only such a run can be continued after a crash.
        resuming: a run that exists is continued; otherwise there must be none.

    Raises:
        UserError: the folder holds a run, belongs to a running one or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        checkpoints: bool = False,
        resuming: bool = False,
    ) -> None:
        check_free(folder, resuming=resuming)
        for name in (RUN, CONFIG, METRICS, SUMMARY, PLOT):
            check_writable(folder / name)
        for path in (folder / MEMORY).glob("rank*"):
            check_writable(path)
        self.folder = folder
        self._lines = 0
        self.dropped = 0
        """Lines of the metrics that `continue_after` did not take for steps."""
        self._new = not (folder / RUN).exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if checkpoints:
                (folder / CHECKPOINTS).mkdir(exist_ok=True)
            # "x": of two runs that start at once in one folder, one fails here and overwrites nothing.
            self._lock = open(folder / RUN, "x" if self._new else "r+")  # noqa: SIM115 (open as long as the run lasts)
            # The lock ends with the process, however that ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._new:
                self.note(run)
                (folder / CONFIG).write_text(pretty(config))
            self._metrics = open(folder / METRICS, "x" if self._new else "a")  # noqa: SIM115
        except FileExistsError:
            raise UserError(f"the run folder {folder} already holds a run; give another --run-dir.") from None
        except BlockingIOError:
            raise UserError(
                f"the run folder {folder} is in use by another run, which has not ended; wait for it or give "
                "another --run-dir."
            ) from None
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be written: {error.strerror}.") from None

    def noted(self) -> dict[str, Any]:
        """What run.json says."""
        text = read_text(self.folder, RUN)
        try:
            return dict(json.loads(text)) if text else {}
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{self.folder / RUN} is not the JSON that a run writes; give another --run-dir.") from None

    def note(self, facts: Mapping[str, Any]) -> None:
        """Add `facts` to run.json, which stays the file that is locked."""
        text = pretty({**self.noted(), **facts})
        self._lock.seek(0)
        self._lock.write(text)
        self._lock.truncate()
        self._lock.flush()

    def records(self, step: int) -> tuple[list[dict[str, Any]], int]:
        """The records of the metrics up to `step`, and how many lines are of no step."""
        records = parse_metrics(self.folder / METRICS)
        if records and records[-1] is CUT:
            records.pop()
        steps = [record for record in records if is_step_line(record)]
        return [record for record in steps if record["step"] <= step], len(records) - len(steps)

    def summary(self) -> dict[str, Any] | None:
        """What summary.json says; None where there is none, or one that is no JSON."""
        try:
            found = json.loads(read_text(self.folder, SUMMARY))
        except (UserError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def continue_after(self, step: int, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Continue the metrics after `step`: later records are dropped, those up to it are returned.

        `config`: the DeepSpeed JSON that is used from here on.
        """
        path = self.folder / METRICS
        kept, self.dropped = self.records(step)
        (self.folder / CONFIG).write_text(pretty(config))
        self._metrics.close()
        replace_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept))
        self._metrics = open(path, "a")  # noqa: SIM115
        self._lines = len(kept)
        return kept

    def write_step(self, record: Mapping[str, Any]) -> None:
        """Append one line of finite numbers (see `strict`), flushed: a killed run keeps the steps it made."""
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            self._metrics.write(line)
            self._metrics.flush()
        except OSError as error:
            raise UserError(f"{self.folder / METRICS} cannot be written: {error.strerror}.") from None
        self._lines += 1

    def close(self) -> None:
        """Close the metrics; remove the folder of a run that made no step, unless it explains why memory ran out."""
        with contextlib.suppress(OSError):  # of a full disk, which has been reported
            self._metrics.close()
        memory = self.folder / MEMORY
        if self._new and self._lines == 0 and not any(memory.glob("rank*-out-of-memory.json")):
            events = self.folder / EVENTS
            own = (self.folder / name for name in (METRICS, RUN, CONFIG))
            for path in (*own, *memory.glob("*.json"), *events.glob("events.*")):
                path.unlink(missing_ok=True)
            for place in (self.folder / CHECKPOINTS, memory, events, self.folder):
                if place.is_dir() and not any(place.iterdir()):
                    place.rmdir()
        self._lock.close()

    def write_end(self, summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str | None:
        """Write the summary and the loss curve of a run that has ended; returns what cannot be written, and why.

        Those of an earlier start of the run do not stay in their place.
        """
        keeps = (self.folder / CHECKPOINTS).is_dir()
        again = f", and the same command with --run-dir {self.folder} writes them" if keeps else ""
        problem = None
        for name, write in (
            (SUMMARY, lambda path: replace_text(path, pretty(summary))),
            (PLOT, lambda path: plot_loss(records, path, title=self.folder.name)),
        ):
            try:
                write(self.folder / name)
            except OSError as error:  # of a full disk: the run is made, and its checkpoint saved
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink(missing_ok=True)
                problem = (
                    f"the run has ended, and its summary and loss curve cannot all be written to {self.folder}: "
                    f"{error.strerror or error}; {METRICS} has every step{again}."
                )
        return problem


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that compute the run."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def run_facts(**facts: Any) -> dict[str, Any]:
    """For run.json: `facts` with the time and the versions of what computed the run."""
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"started": started, **facts, "versions": versions()}


def plot_loss(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss over steps as a PNG; steps without a finite loss leave a gap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas without pyplot: no global state, no display.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    losses = [math.nan if record["loss"] is None else record["loss"] for record in records]
    axes.plot([record["step"] for record in records], losses, linewidth=1.75, color=_LINES[0], label="training")
    validated = [record for record in records if record.get("val_loss") is not None]
    if validated:
        steps = [record["step"] for record in validated]
        marked: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "linestyle": "none", "markeredgewidth": 2}
        axes.plot(steps, [record["val_loss"] for record in validated], color=_LINES[1], label="validation", **marked)
    axes.set_title(title, parse_math=False, loc="left", weight="bold")  # a "$" in a name is no formula
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, colors=_QUIET)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", color=_RULE)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def pretty(value: Mapping[str, Any]) -> str:
    """`value` as strict JSON for people, without secrets."""
    return json.dumps(masked(strict(value)), indent=2, allow_nan=False, default=str) + "\n"
