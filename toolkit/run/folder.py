"""A run's folder: claimed once, then metrics.jsonl line by line, and a summary and a plot at the end.

Files: run.json (settings, batch, versions), ds_config.json (the DeepSpeed JSON as used), metrics.jsonl (one
line per optimizer step), summary.json, loss.png, and the folder memory (`toolkit.memory.records`).
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.memory.records import FOLDER as MEMORY

RUN, CONFIG, METRICS, SUMMARY, PLOT = (
    "run.json",
    "ds_config.json",
    "metrics.jsonl",
    "summary.json",
    "loss.png",
)
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


def check_free(folder: Path) -> None:
    """Raise UserError if `folder` holds a run already, or cannot hold one."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the run folder {folder} is a file; give --run-dir a folder.")
    held = next((name for name in (METRICS, RUN) if (folder / name).exists()), None)
    if held is not None:
        raise UserError(f"the run folder {folder} already holds a run ({held}); give another --run-dir.")


class RunFolder:
    """Rank 0's hold on the folder of one run.

    Args:
        folder: created if missing; must hold no run.
        run: what run.json says about the run.
        config: the DeepSpeed JSON as used.

    Raises:
        UserError: the folder already holds a run or cannot be written.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        check_free(folder)
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # "x": of two runs that start at once in one folder, one fails here and overwrites nothing.
            with open(folder / RUN, "x") as file:
                file.write(_pretty(run))
            self._metrics = open(folder / METRICS, "x")  # noqa: SIM115 (open for as long as the run lasts)
        except FileExistsError:
            raise UserError(f"the run folder {folder} already holds a run; give another --run-dir.") from None
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be written: {error.strerror}.") from None
        (folder / CONFIG).write_text(_pretty(config))
        self._lines = 0

    def write_step(self, record: Mapping[str, Any]) -> None:
        """Append one line of finite numbers (see `strict`), flushed: a killed run keeps the steps it made."""
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self._metrics.flush()
        self._lines += 1

    def close(self) -> None:
        """Close the metrics; a run that never made a step, and not for want of memory, gives its folder back."""
        self._metrics.close()
        memory = self.folder / MEMORY
        if self._lines == 0 and not any(memory.glob("rank*-out-of-memory.json")):
            for path in (*(self.folder / name for name in (METRICS, RUN, CONFIG)), *memory.glob("*.json")):
                path.unlink(missing_ok=True)
            for folder in (memory, self.folder):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        (self.folder / SUMMARY).write_text(_pretty(summary))


def strict(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` as strict JSON allows it: NaN and infinities become null, and `nonfinite` names them."""
    bad = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    clean = {key: None if key in bad else value for key, value in record.items()}
    return {**clean, "nonfinite": bad} if bad else clean


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def describe(**facts: Any) -> dict[str, Any]:
    """`facts` with the time and the versions of what computed the run."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **facts,
        "versions": versions,
    }


def plot_loss(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss over steps as a PNG; steps without a finite loss leave a gap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas without pyplot: no global state, no display.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    losses = [math.nan if record["loss"] is None else record["loss"] for record in records]
    axes.plot([record["step"] for record in records], losses, linewidth=1, label="training")
    validated = [record for record in records if record.get("val_loss") is not None]
    if validated:
        steps = [record["step"] for record in validated]
        axes.plot(steps, [record["val_loss"] for record in validated], marker="o", label="validation")
    axes.set(title=title, xlabel="optimizer step", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(strict(value), indent=2, allow_nan=False, default=str) + "\n"
