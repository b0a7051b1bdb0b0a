"""The figures of each step for TensorBoard or Weights & Biases: `--track`.

metrics.jsonl stays what a run goes by. What draws it is imported only where it is asked for, on rank 0.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from toolkit.errors import UserError
from toolkit.records.run import EVENTS
from toolkit.run.folder import RunFolder
from toolkit.sentences import one_line

Tracker = Literal["tensorboard", "wandb"]
_WHOLE = ("memory_bytes",)
"""Figures that are whole numbers; the others are the same in every step."""
_OFFLINE = "; with WANDB_MODE=offline no key and no network is needed, and `wandb sync` sends the run later"


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures in a line of metrics.jsonl, by the name of their curve."""
    known = {name: value for name, value in record.items() if isinstance(value, float) or name in _WHOLE}
    return {"Validation/loss" if name == "val_loss" else f"Train/{name}": value for name, value in known.items()}


def check(tracker: Tracker | None) -> None:
    """Raise UserError where its package is missing."""
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise UserError(f"--track {tracker} needs a package that is not installed: pip install {tracker}.")


class _Writer(Protocol):
    begun: bool
    """Whether it has the steps before the one that it is opened for."""
    told: str
    """Where its curves are."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: RunFolder, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = folder.folder / EVENTS
        self.begun = any(place.glob("*"))
        self.told = f"curves in {place}: tensorboard --logdir {folder.folder.parent}"
        # Of steps that are made again, since the run ended before its next checkpoint, the later ones are shown.
        self._writer = SummaryWriter(str(place), purge_step=after + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: RunFolder, after: int) -> None:
        import wandb

        facts = folder.noted()
        known = facts.pop("wandb_run", None)
        self.begun = known is not None
        name = known if isinstance(known, str) else uuid.uuid4().hex
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "leanstate"),
            name=os.environ.get("WANDB_NAME", folder.folder.name),
            id=name,
            resume="allow",
            dir=str(folder.folder),
            config=facts,
            settings={"console": "off"},
        )
        folder.note({"wandb_run": name})
        self.told = f"curves in {self._run.dir if self._run.offline else self._run.url}"
        self._next = self._run.starting_step

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next:  # it takes no step twice: those that are made again are there already
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Tracking:
    """Writes the figures of steps; what fails on the way is said once, and the run goes on without.

    Args:
        tracker: what writes them.
        folder: of the run.
        after: the step that the run continues after; 0 from the start.
        earlier: lines of metrics.jsonl of the steps that were made before; a tracker that is new gets them, too.
        say: shows a line.

    Raises:
        UserError: it does not start.
    """

    def __init__(
        self,
        tracker: Tracker,
        folder: RunFolder,
        after: int,
        earlier: Iterable[Mapping[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self._name, self._say = tracker, say
        self._writer: _Writer | None = None
        try:
            self._writer = (_TensorBoard if tracker == "tensorboard" else _Wandb)(folder, after)
        except Exception as error:  # of the network, a key, a package that does not fit the others
            hint = _OFFLINE if tracker == "wandb" else ""
            raise UserError(f"--track {tracker}: {one_line(error).rstrip('.')}{hint}.") from None
        say(self._writer.told)
        for record in () if self._writer.begun else earlier:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """`record`: a line of metrics.jsonl."""
        if self._writer is None:
            return
        try:
            self._writer.write(record["step"], scalars(record))
        except Exception as error:
            self._writer = None
            self._say(
                f"note: --track {self._name}: {one_line(error)}; nothing more is written there, and the run goes on. "
                "metrics.jsonl has every step."
            )

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                self._say(f"note: --track {self._name}: {one_line(error)}.")
