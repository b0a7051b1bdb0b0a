"""When memory runs out: what was held, what was asked and what would help, written down before the process ends.

Whatever needs memory is made beforehand: the changes that would help, the limits, and a reserve of address space that
is given back first. A process that the kernel kills (SIGKILL, its out-of-memory killer) leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import torch

from toolkit.memory import snapshot
from toolkit.memory.machine import address_space
from toolkit.memory.saved_tensors import reachable_tensors
from toolkit.memory.watermarks import RESERVED_SPACE, limits, watermark
from toolkit.records import categories as c
from toolkit.records.by_category import Named, by_category
from toolkit.records.machine import local_size
from toolkit.records.memory import (
    FOLDER,
    Change,
    LargeTensor,
    OutOfMemoryRecord,
    Phase,
    Prediction,
    Setup,
    write_record,
)
from toolkit.records.sizes import counted, size_text

RESERVE = 64 << 20
"""Bytes of address space that are kept free for writing; they are never resident."""

CHANGES = 3
SHOWN_TENSORS = 12

_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "alloc_failed",
    "can't start new thread",
    "could not create a memory",
    "unable to mmap",
)
_ASKED = (
    re.compile(r"tried to allocate (\d+) bytes"),
    re.compile(r"Tried to allocate (\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB|TiB)"),
    re.compile(r"Unable to allocate (\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB|TiB)"),
)
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def failed_allocation(error: BaseException | None) -> BaseException | None:
    """The failed allocation that `error` is or comes from, or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return error
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return error
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS):
            return error
        error = error.__cause__ or error.__context__
    return None


def asked_bytes(message: str) -> int | None:
    """Bytes of the allocation that failed, where the message of torch or numpy says so."""
    for pattern in _ASKED:
        if match := pattern.search(message):
            unit = match[2] if match.lastindex == 2 else "bytes"
            return round(float(match[1]) * _UNITS[unit])
    return None


def json_name(rank: int) -> str:
    return f"rank{rank}-out-of-memory.json"


class Explainer:
    """Explains a failed allocation of this rank, once; as a context manager, of all that happens within.

    Args:
        folder: of the run.
        rank: of this process.
        device: whose memory is watched.
        predicted: by `toolkit.estimate.predict`; what each phase was expected to hold stands beside what it held.
        named_already: bytes of the tensors that exist already, and that will be named when something fails.

    The ledger keeps `setup`, `inventory`, `vocabulary`, `phase` and `step` up to date.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        device: torch.device,
        *,
        predicted: Prediction | None = None,
        named_already: int = 0,
    ) -> None:
        self.folder, self.rank, self.device = folder, rank, device
        self._began = time.time()
        self.phase, self.step = c.INIT, 1
        self.setup: Setup | None = None
        self.inventory: Callable[[], Iterable[Named]] = tuple
        self.vocabulary: int | None = None
        self.written: Path | None = None
        self.predicted = predicted
        self._changes: list[Change] = []
        self.limits = limits(device, local_size())
        self._watermark = watermark(device)
        self.at_start = 0 if device.type == "cuda" else max(0, self._watermark.now() - named_already)
        self._reserve: mmap.mmap | None = None
        with contextlib.suppress(OSError):
            self._reserve = mmap.mmap(-1, RESERVE)

    def __enter__(self) -> Explainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            self.explain(value)

    @property
    def limit(self) -> int | None:
        """The smallest of the limits."""
        return min(self.limits.values(), default=None)

    def take_changes(self, changes: Iterable[Change]) -> None:
        """What other settings would hold. Before the run: there may be no memory to compute it later."""
        self._changes = sorted((x for x in changes if x.saves > 0), key=lambda change: -change.saves)[:CHANGES]

    def _needed(self, limit: str) -> int:
        """Bytes that are predicted to count against `limit`; 0 where nothing is predicted."""
        if self.predicted is None:
            return 0
        # The limit on address space also counts what the libraries have mapped.
        before = address_space() if limit == RESERVED_SPACE else self.at_start
        return self.predicted.needed + (0 if self.device.type == "cuda" else before or 0)

    def share(self) -> float:
        """The largest share of a limit that the run is predicted to need."""
        return max((self._needed(what) / limit for what, limit in self.limits.items()), default=0.0)

    def warning(self, *, surely: bool = False) -> str | None:
        """One sentence where the prediction exceeds a limit; None where it fits or is not known.

        `surely`: not for a limit on address space, which counts what is never used, too.
        """
        for what, limit in self.limits.items():
            if (total := self._needed(what)) > limit and not (surely and what == RESERVED_SPACE):
                return (
                    f"this run is predicted to need {size_text(total)} on its largest rank, more than the limit of "
                    f"{size_text(limit)} ({what}); see `toolkit plan` for settings that fit."
                )
        return None

    def words(self) -> str:
        """The limits in one line, and what is predicted of them."""
        text = "memory: " + ", ".join(f"at most {size_text(size)} ({what})" for what, size in self.limits.items())
        if self.predicted is not None:
            predicted = self.predicted
            text += f"; predicted peak {size_text(predicted.peak)}, in {predicted.peak_phase}"
        return text

    def ended_by_memory(self) -> bool:
        """Whether this rank, or another one of this run, has run out of memory and said why."""
        # A resumed run may hold the pages of the time before.
        return self.written is not None or any(
            path.stat().st_mtime >= self._began for path in (self.folder / FOLDER).glob("rank*-out-of-memory.json")
        )

    def explain(self, error: BaseException) -> Path | None:
        """Write what is known about the failed allocation in `error`; None if it is none, or nothing can be written.

        Everything that was held when it failed must still be held: call it while the exception is being handled.
        """
        cause = failed_allocation(error)
        if cause is None or self.written is not None:
            return self.written
        if self._reserve is not None:
            self._reserve.close()
        message = str(cause).strip().splitlines()
        try:
            record = OutOfMemoryRecord(
                setup=self.setup or (self.predicted.setup if self.predicted is not None else None),
                rank=self.rank,
                phase=self.phase,
                step=None if self.phase == c.INIT else self.step,
                asked=asked_bytes(str(cause)),
                limit=self.limit,
                held={},
                changes=self._changes,
                message=f"{type(cause).__name__}: {message[0] if message else ''}",
            )
            # What is sure to be written first: looking for the activations takes some memory.
            tensors = self._fill(record, self.inventory())
            path = self._write(record)
        except Exception as problem:
            print(f"error: rank {self.rank} ran out of memory, and of memory to say why: {problem!r}", file=sys.stderr)
            return None
        with contextlib.suppress(Exception):
            saved = record.setup is not None and not record.setup.activations.checkpoint
            more = reachable_tensors(error, self.phase, saved=saved, vocabulary=self.vocabulary)
            tensors = self._fill(record, itertools.chain(self.inventory(), more))
            self._write(record)
        self.written = path
        place = f"{self.phase}, step {self.step}" if record.step is not None else self.phase
        print(f"error: rank {self.rank} ran out of memory ({place}): see {path}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            self._write_snapshot(tensors)
        return path

    def _write(self, record: OutOfMemoryRecord) -> Path:
        write_record(self.folder, json_name(self.rank), record)
        path = self.folder / FOLDER / f"rank{self.rank}-out-of-memory.md"
        path.write_text(self._page(record), encoding="utf-8")
        return path

    def _write_snapshot(self, tensors: list[LargeTensor]) -> None:
        path = self.folder / FOLDER / f"rank{self.rank}-out-of-memory.pickle"
        if self.device.type == "cuda":
            snapshot.write_cuda(path)
        else:
            snapshot.write(path, snapshot.of_tensors(tensors))

    def _fill(self, record: OutOfMemoryRecord, named: Iterable[Named]) -> list[LargeTensor]:
        found, _, tensors = by_category(named, self.device.type)
        rest = self._watermark.now() - self.at_start - sum(found.values())
        record.held = found | {c.OTHER: rest} if rest > 0 else found
        record.blocks = tensors
        return tensors

    def _page(self, record: OutOfMemoryRecord) -> str:
        lines = [f"# Rank {record.rank} ran out of memory", ""]
        lines.append(
            f"In the phase **{record.phase}**"
            + (f" of step {record.step}" if record.step is not None else "")
            + (f", when {_exact(record.asked)} more were asked for." if record.asked is not None else ".")
        )
        lines += ["", f"    {record.message}", ""]
        lines += [f"* limit: {_exact(size)} ({what})" for what, size in self.limits.items()]
        if record.setup is not None:
            s = record.setup
            lines.append(
                f"* run: {s.model}, {s.parameters:,} parameters, {s.optimizer} ({s.state_format}, "
                f"weights {s.weights}), ZeRO {s.stage}, {counted(s.world_size, 'rank')}, micro-batch {s.micro_batch} x "
                f"accumulation {s.gradient_accumulation}, {counted(s.seq_len, 'token')} a sequence"
            )
        lines += self._table(record)
        if record.blocks:
            lines += ["", "## The largest tensors", ""]
            lines += ["| bytes each | number | category | what |", "|---:|---:|---|---|"]
            alike = Counter((one.bytes, one.category, one.what) for one in record.blocks).items()
            lines += [f"| {size:,} | {n} | {name} | {what} |" for (size, name, what), n in [*alike][:SHOWN_TENSORS]]
        lines += ["", "## What would help", ""]
        if record.changes:
            lines += ["| change | saves at the peak, bytes | peak then, bytes |", "|---|---:|---:|"]
            lines += [f"| `{x.change}` | {x.saves:,} | {x.peak:,} |" for x in record.changes]
            lines += ["", "As predicted by `toolkit estimate` for the largest rank; each change on its own."]
        else:
            lines.append("`toolkit plan` names settings that fit, and `toolkit estimate` what others would save.")
        return "\n".join(lines) + "\n"

    def _table(self, record: OutOfMemoryRecord) -> list[str]:
        phases: Iterable[Phase] = self.predicted.phases if self.predicted is not None else ()
        expected = next((phase for phase in phases if phase.name == record.phase), None)
        head = "| category | held, bytes |" + (" predicted at this phase's peak |" if expected else "")
        lines = ["", "## What was held", "", head, "|---|---:|" + ("---:|" if expected else "")]
        names = c.ordered({*record.held, *(expected.held if expected else ())})
        for name in names:
            row = f"| {name} | {record.held.get(name, 0):,} |"
            lines.append(row + (f" {expected.held.get(name, 0):,} |" if expected else ""))
        total = f"| **sum** | {sum(record.held.values()):,} |"
        lines.append(total + (f" {expected.peak or 0:,} |" if expected else ""))
        lines += ["", _HELD_CUDA if self.device.type == "cuda" else _HELD_CPU]
        return lines


_HELD_CUDA = (
    "*activations* are those that the failing frames lead to; *other* is what torch's allocator holds beyond what has "
    "a name."
)
_HELD_CPU = (
    "*activations* are those that the failing frames lead to; *other* is what the process grew by since before the "
    "model was built, beyond what has a name: libraries loaded meanwhile, and memory that was freed but kept for reuse."
)


def _exact(size: int) -> str:
    return f"{size_text(size)} ({size:,} bytes)"
