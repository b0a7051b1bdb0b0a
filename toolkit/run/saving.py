"""When a run saves, what it notes beside the state, and the thread that writes while training continues."""

from __future__ import annotations

import logging
import math
import random
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.agreed import AgreedError
from toolkit.errors import UserError
from toolkit.printable import warn_once
from toolkit.records.machine import local_size
from toolkit.run import ranks
from toolkit.run.folder import versions
from toolkit.sentences import one_line

if TYPE_CHECKING:
    from toolkit.checkpoint.source import Source
    from toolkit.checkpoint.store import Store

logger = logging.getLogger("toolkit")


class Due:
    """At which steps a run saves, so that what is not in a checkpoint is never more than `every` steps.

    A checkpoint is in place before step `every` + 1 after the last one begins: it is begun some steps earlier, beside
    which it is written, and for what is not written by then training waits. How many steps earlier the time of the last
    one says, in tenths of `every`, one at least and four at most: so that a run which is made again saves at the same
    steps, though times vary. Below ten steps it is none, and training waits for each.

    Args:
        every: more than 0.
        keep_every: multiples of it are saved, too; 0 for none.
        start: the step that the run continues after, which is in a checkpoint or needs none.
    """

    def __init__(self, every: int, keep_every: int, start: int) -> None:
        self._every, self._keep_every = every, keep_every
        self._tenth = self._early = every // 10
        self._start = self._last = start
        self._by: int | None = None

    def at(self, step: int) -> bool:
        """Whether a checkpoint of `step` is to be begun."""
        apart = self._every - self._early
        kept = self._keep_every > 0 and step % self._keep_every == 0
        return kept or step % apart == 0 or step - self._last >= apart

    def begun(self, step: int, saved: int) -> None:
        """That of `step` is being written, and `saved` is the newest that is in place."""
        self._last, self._by = step, max(saved, self._start) + self._every

    @property
    def writing(self) -> bool:
        """Whether one was begun that no rank has waited for; the same on all ranks."""
        return self._by is not None

    def late(self, step: int) -> bool:
        """Whether it has to be in place before the step after `step`."""
        return self._by is not None and step >= self._by

    def ended(self, took: float) -> None:
        """Writing it has taken as long as `took` steps, a number that is the same on all ranks."""
        self._by = None
        if self._tenth:
            self._early = self._tenth * min(max(math.ceil(took / self._tenth), 1), 4)


class Saver:
    """Saves checkpoints of `engine` in `store`; every rank has one and calls it at the same steps.

    Training waits while what a checkpoint holds is copied to host memory. A thread then writes it; one checkpoint is
    written at a time. The ranks' threads agree over a process group of their own that all have written, and only
    then rank 0 puts the checkpoint in place. On CPUs, where the copies would take more than half of the memory that is
    left, there are none: training waits until the checkpoint is in place, and codes are written as they lie.

    Args:
        model_files: what goes into each checkpoint beside the weights, by name (`toolkit.checkpoint.model_files`),
            for `toolkit export`; rank 0's counts.
        base: leave the frozen weights beside adapters out (`toolkit.zero.checkpoint.capture`).
    """

    def __init__(
        self, engine: Any, store: Store, model_files: Mapping[str, bytes] | None = None, *, base: bool = False
    ) -> None:
        from torch import distributed

        from toolkit.zero.checkpoint import sharding

        self._engine = engine
        self._store = store
        self._base = base
        self._model_files = dict(model_files or {}) if ranks.rank() == 0 else {}
        self._sharding = sharding(engine)
        self._group = distributed.new_group(backend="gloo")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[str | None] | None = None
        self._step = 0
        self._told = False
        self.saved = 0
        """Step of the newest checkpoint that this object knows to be in place."""
        self.seconds = 0.0
        """From when the last one was begun until it was in place."""
        if ranks.rank() == 0:
            store.tidy()

    def begin(self, source: Source | None) -> None:
        """Note the checkpoint that the run resumed from, if it is its own."""
        if source is not None and source.folder.resolve().parent == self._store.folder.resolve():
            self.saved = source.manifest.step

    def start(self, step: int, facts: Mapping[str, Any]) -> float:
        """Begin to save; returns the seconds that training was kept waiting, the last checkpoint's end left out.

        `facts` go into the manifest: JSON, the same on every rank.
        """
        from toolkit.checkpoint.manifest import Manifest
        from toolkit.checkpoint.store import name_of
        from toolkit.zero.checkpoint import capture

        assert self._running is None, "poll or wait first"
        began = time.perf_counter()
        draft = ranks.from_first(self._store.draft(step))
        copy = ranks.from_first(self._can_copy())
        files = capture(
            self._engine,
            self._sharding.by_name,
            draft,
            step,
            {"random": random_states()},
            copy=copy,
            base=self._base,
        )
        files |= {draft / name_of(step) / name: content for name, content in self._model_files.items()}
        about = {"saved": datetime.now().astimezone().isoformat(timespec="seconds"), **facts, "versions": versions()}
        self._step = step
        manifest = Manifest(step, self._sharding, about)
        self._running = self._worker.submit(self._write, draft, files, manifest, began, squeezed=copy)
        if not copy:
            wait([self._running])  # what it writes is the engine's own
        return time.perf_counter() - began

    def _can_copy(self) -> bool:
        """Whether this machine has the memory for copies of what its ranks hold, as far as rank 0 can tell."""
        from toolkit.memory.machine import unused
        from toolkit.records.sizes import size_text
        from toolkit.zero.checkpoint import copied_bytes

        copies, room = copied_bytes(self._engine) * local_size(), unused()
        if 2 * copies <= room:
            return True
        if not self._told:
            self._told = True
            warn_once(
                logger,
                "training waits while a checkpoint is written: copies of weights and state would take %s of the %s "
                "that are left",
                size_text(copies),
                size_text(room),
            )
        return False

    def poll(self) -> str | None:
        """What there is to say of a checkpoint that has come to its end, once."""
        return self.wait() if self._running is not None and self._running.done() else None

    def wait(self) -> str | None:
        """As `poll`, after waiting for that end."""
        if self._running is None:
            return None
        problem, self._running = self._running.result(), None
        if problem is None:
            self.saved = self._step
            return None
        newest = f"the newest is that of step {self.saved}" if self.saved else "there is none yet"
        return f"the checkpoint of step {self._step} was not saved ({problem}); {newest}."

    def now(self, step: int, facts: Mapping[str, Any]) -> None:
        """Save and wait until the checkpoint is in place.

        Raises:
            UserError: it could not be written; raised by every rank.
        """
        self.wait()
        if self.saved != step:
            self.start(step, facts)
            problem = self.wait()
            if problem is not None:
                raise AgreedError(problem)

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown(cancel_futures=True)

    def _write(self, draft: Path, files: dict[Path, Any], manifest: Any, began: float, *, squeezed: bool) -> str | None:
        """In the thread: this rank's files, then, on rank 0, the commit. Returns what went wrong on any rank."""
        from torch import distributed

        written: dict[str, dict[str, Any]] = {}
        problem = None
        try:
            written = _write_files(files, squeezed)
        except OSError as error:
            problem = one_line(error)
        del files
        everyone: list[Any] = [None] * ranks.world_size()
        distributed.all_gather_object(everyone, (written, problem), group=self._group)
        problem = next((found for _, found in everyone if found is not None), None)
        if ranks.rank() == 0:
            try:
                if problem is None:
                    self._commit(draft, manifest, {name: e for entries, _ in everyone for name, e in entries.items()})
            except OSError as error:
                problem = one_line(error)
            if problem is not None:
                self._store.discard(draft)
        box = [problem]
        distributed.broadcast_object_list(box, src=0, group=self._group)
        self.seconds = time.perf_counter() - began
        return box[0]

    def _commit(self, draft: Path, manifest: Any, entries: dict[str, dict[str, Any]]) -> None:
        from toolkit.zero.checkpoint import RECOVERY_SCRIPT

        shutil.copy(RECOVERY_SCRIPT, draft / RECOVERY_SCRIPT.name)
        manifest.files = entries
        self._store.commit(draft, manifest)


def _write_files(files: Mapping[Path, Any], squeezed: bool) -> dict[str, dict[str, Any]]:
    from toolkit.checkpoint.files import save
    from toolkit.paths import sync_folder

    written = {}
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        written[path.name] = save(content, path, squeezed=squeezed)
    for folder in {path.parent for path in files}:
        sync_folder(folder)
    return written


def random_states() -> dict[str, Any]:
    """The states of the random number generators of Python, numpy and torch in this process."""
    import numpy
    import torch

    legacy: Any = numpy.random.get_state()
    name, keys, *rest = legacy
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put them back.

    Raises:
        UserError: they are none.
    """
    import numpy
    import torch

    try:
        random.setstate(states["python"])
        name, keys, *rest = states["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint's states of random number generators are damaged ({error})") from None
