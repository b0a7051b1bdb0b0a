"""The figures of each step for TensorBoard or Weights & Biases: `--track`.

metrics.jsonl stays what a run goes by. What draws it is imported only where it is asked for, on rank 0.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from toolkit.errors import UserError
from toolkit.records.run import EVENTS, METRICS
from toolkit.run.folder import RunFolder
from toolkit.sentences import one_line

Tracker = Literal["none", "tensorboard", "wandb"]
_NO_CURVES = ("step", "sequences", "tokens")
"""Whole numbers that are the axis, or the same in every step."""
_OFFLINE = "; with WANDB_MODE=offline no key and no network is needed, and `wandb sync` sends the run later"
_MENDABLE = ("ImportError", "UsageError", "AuthenticationError")
"""Errors that the user can mend before a run begins, by name: of packages that do not fit, and of W&B, of a key. All
others are outages."""
_CLOSING_SECONDS, _FAILED_SECONDS = 60.0, 5.0
"""How long the end of a run waits for what draws it. After an error other ranks wait as long to hear of it."""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures in a line of metrics.jsonl, by the name of their curve."""
    return {
        "Validation/loss" if name == "val_loss" else f"Train/{name}": value
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in _NO_CURVES
    }


def check(tracker: Tracker | None) -> None:
    """Raise UserError where its package is missing."""
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise UserError(
            f"--track {tracker} needs a package that is not installed: pip install {tracker}, or give --track none."
        )


class _Writer(Protocol):
    has: int
    """The last step that it has of those before the one that it is opened for; 0: none."""
    told: str
    """Where its curves are."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, folder: RunFolder, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = folder.folder / EVENTS
        self.has = min(after, _has(place))
        self.told = f"curves in {place}: tensorboard --logdir {shlex.quote(str(folder.folder.parent))}"
        self._hook = threading.excepthook
        threading.excepthook = self._failed
        # Of steps that are made again, since the run ended before its next checkpoint, the later ones are shown.
        self._writer = SummaryWriter(str(place), purge_step=self.has + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _failed(self, error: threading.ExceptHookArgs) -> None:
        """Its thread ends with an error, which the next call raises anew: no traceback is needed."""
        if "tensorboard" not in type(error.thread).__module__:
            self._hook(error)

    def close(self, failed: bool) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook


def _has(place: Path) -> int:
    """The last step that the curves in `place` surely have whole: the last event may be of one that was broken off."""
    from tensorboard.compat.proto.event_pb2 import Event

    files = sorted(place.glob("events.*"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not files:
        return 0
    content, at, last = files[-1].read_bytes(), 0, b""
    while len(content) >= at + 12:  # a record: its length, that one's checksum, the event, its checksum
        size = int.from_bytes(content[at : at + 8], "little")
        if len(content) < at + size + 16:
            break
        last = content[at + 12 : at + 12 + size]
        at += size + 16
    return max(0, Event.FromString(last).step - 1)


class _Wandb:
    def __init__(self, folder: RunFolder, after: int) -> None:
        import wandb

        facts = folder.noted()
        known = facts.pop("wandb_run", None)
        name = known if isinstance(known, str) else uuid.uuid4().hex
        # Only newer versions know it; of the others the process may wait for the network once the run has ended.
        bounded = "finish_timeout" in getattr(getattr(wandb, "Settings", None), "model_fields", {})
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "leanstate"),
            name=os.environ.get("WANDB_NAME", folder.folder.name),
            id=name,
            resume="allow",
            dir=str(folder.folder),
            config=facts,
            settings={"console": "off", **({"finish_timeout": _CLOSING_SECONDS} if bounded else {})},
        )
        folder.note({"wandb_run": name})
        self.told = f"curves in {self._run.dir if self._run.offline else self._run.url}"
        self._next = self._run.starting_step
        # Offline it does not know what its files have.
        self.has = after if self._run.offline and known is not None else self._next - 1

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next:  # it takes no step twice: those that are made again are there already
            self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Tracking:
    """Writes the figures of steps. An outage is said once, and the run continues; its next start makes up for it.

    Args:
        tracker: what writes them.
        folder: of the run.
        after: the step that the run continues after; 0 from the start.
        earlier: lines of metrics.jsonl of the steps that were made before; a tracker that lacks them gets them, too.
        say: shows a line.

    Raises:
        UserError: it does not start for what the user can mend, and nor has the run.
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
        except Exception as error:
            # A run that has made steps is not lost for its curves, nor one that begins for an outage.
            if after > 0 or not {kind.__name__ for kind in type(error).__mro__}.intersection(_MENDABLE):
                self._give_up(error)
                return
            hint = _OFFLINE if tracker == "wandb" else ""
            raise UserError(
                f"--track {tracker}: {one_line(error).rstrip('.')}{hint}; --track none does without."
            ) from None
        say(self._writer.told)
        has = self._writer.has
        for record in earlier:
            if record["step"] > has:
                self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """`record`: a line of metrics.jsonl."""
        if self._writer is None:
            return
        try:
            self._writer.write(record["step"], scalars(record))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        self._say(
            f"note: --track {self._name}: {one_line(error).rstrip('.')}; nothing more is written there, and the run "
            f"continues: {METRICS} has every step, and the next start of the run brings them there."
        )

    def close(self, *, failed: bool = False) -> None:
        """`failed`: the run ends with an error. It waits for a limited time, since the network may be gone."""
        if self._writer is None:
            return
        writer, problems = self._writer, list[Exception]()
        self._writer = None

        def end() -> None:
            try:
                writer.close(failed)
            except Exception as error:
                problems.append(error)

        ending = threading.Thread(target=end, name="tracking", daemon=True)
        ending.start()
        ending.join(seconds := _FAILED_SECONDS if failed else _CLOSING_SECONDS)
        said = one_line(problems[0]).rstrip(".") if problems else f"it has not ended within {seconds:.0f} s"
        if problems or ending.is_alive():
            self._say(f"note: --track {self._name}: {said}; {METRICS} has every step.")
