"""Follows a DeepSpeed engine and writes down what each phase of its steps holds, rank by rank.

    ledger = toolkit.memory.watch(engine, run_dir="runs/mine")
    ...                                                # the training loop, as it is
    ledger.close()

Levels: "off" does nothing; "summary" reads the allocator's watermark (GPU) or the resident set (CPU) at the border of
every phase, and once adds up what is in memory by name; "full" also traces one whole step, every allocation of it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from toolkit.memory import snapshot
from toolkit.memory.machine import host
from toolkit.memory.out_of_memory import Explainer
from toolkit.memory.phases import PhasePeaks
from toolkit.memory.storages import largest_tensors
from toolkit.memory.trace import StepTrace, counted
from toolkit.memory.watermarks import CachingAllocator, watermark
from toolkit.models.build import CausalLM
from toolkit.records import categories as c
from toolkit.records.by_category import Named, by_category
from toolkit.records.memory import FOLDER, LargeTensor, Measurement, Phase, Setup, Timeline, measured_name, write_record

logger = logging.getLogger("toolkit")

Level = Literal["off", "summary", "full"]

TRACED_STEP = 3
"""The optimizer's state is made in the first step, and its compiler has gone by the third."""

WRITE_SECONDS = 60.0
"""The record is written anew at the end of a step so long after the last time: a run that is killed leaves it."""

_METHODS = {
    "forward": c.FORWARD,
    "backward": c.BACKWARD,
    "_backward_prologue": c.BACKWARD,  # where the user calls loss.backward()
    "allreduce_gradients": c.REDUCE,
    "step": c.STEP,
    "save_checkpoint": c.CHECKPOINT,
}
# What comes after these is still theirs: a loss computed outside of the engine, gradients after their reduction.
_LASTING = (c.FORWARD, c.BACKWARD)


class Ledger:
    """Measures what `engine` holds until `close`; made by `watch`.

    Also a context manager, which explains memory that ran out anywhere within it, and not only in the engine.

    Args:
        engine: DeepSpeed's.
        folder: of the run; records go to its folder `memory`.
        level: "off", "summary" or "full".
        inventory: what the engine holds, by category and name.
        setup: what the engine trains, given the length of its sequences.
        explainer: told of the phase and step, and of allocations that fail.
        seq_len: predictions of a sequence; else read off the first batch.
        step: which one to trace, from 1 (level "full").
    """

    def __init__(
        self,
        engine: Any,
        folder: Path,
        level: Level,
        *,
        inventory: Callable[[], Iterable[Named]],
        setup: Callable[[int], Setup],
        explainer: Explainer,
        seq_len: int | None = None,
        step: int = TRACED_STEP,
    ) -> None:
        self._began = time.perf_counter()
        self._engine, self._folder, self._level = engine, folder, level
        self._inventory, self._setup, self._explainer = inventory, setup, explainer
        self._seq_len, self._traced_step = seq_len or 0, step
        self._watermark = watermark(engine.device)
        self._peaks = PhasePeaks(self._watermark)
        self._on_gpu = engine.device.type == "cuda"
        self._steps = 0
        self._cost = 0.0
        self._step_began: float | None = None
        self._durations: list[float] = []
        self._trace: StepTrace | None = None
        self._resident: dict[str, int] = {}
        self._host: dict[str, int] = {}
        self._largest_tensors: list[LargeTensor] = []
        self._timeline: Timeline | None = None
        self._traced_phases: dict[str, Phase] = {}
        self._patched: list[str] = []
        self._closed = level == "off"
        output = getattr(getattr(engine.module, "hf", engine.module), "get_output_embeddings", None)
        self._head = output() if output is not None else None
        explainer.vocabulary = getattr(self._head, "out_features", None)
        explainer.inventory, explainer.phase = inventory, c.INIT
        explainer.setup = setup(self._seq_len)
        self._follow()
        self._hook = sys.excepthook
        sys.excepthook = self._uncaught
        if not self._closed:
            atexit.register(self.close)
            self._write()
            self._peaks.begin(None)
        self._cost += time.perf_counter() - self._began

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            self._explainer.explain(value)
        self.close()

    def _uncaught(self, kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        """What the user's loop allocates is not the engine's; this is where a failure of it comes by."""
        self._explainer.explain(value)
        self._hook(kind, value, trace)

    # ---- phases ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within belongs to phase `name`, "eval" or "checkpoint"."""
        if name not in c.PHASES:
            raise ValueError(f"there is no phase {name!r}: expected {', '.join(c.PHASES)}.")
        before = self._peaks.phase
        self._enter(name)
        try:
            yield
        except BaseException as error:
            self._explainer.explain(error)
            raise
        finally:
            self._enter(before)

    def _enter(self, name: str | None) -> None:
        if name is not None:
            self._explainer.phase = name
        if self._closed or name == self._peaks.phase:
            return
        began = time.perf_counter()
        self._peaks.end()
        if self._trace is not None and name is not None:
            self._trace.phase(name)
        self._peaks.begin(name)
        self._cost += time.perf_counter() - began

    @property
    def largest(self) -> int:
        """The run's peak so far: bytes allocated on a GPU, resident on a CPU.

        What `torch.cuda.max_memory_allocated` and getrusage say otherwise, whose marks are reset at every phase.
        """
        return self._peaks.largest

    @property
    def counted(self) -> int | None:
        """Bytes of that which the model and its steps held, counted in the traced step on a CPU; None: not counted."""
        return self.record().peak if self._timeline is not None and not self._on_gpu else None

    # ---- the engine -----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Put this ledger's own in place of the engine's methods, on this one engine."""
        for method, phase in _METHODS.items():
            original = getattr(self._engine, method, None)
            if original is None or method in vars(self._engine):
                continue
            wrap = {"forward": self._forward, "step": self._stepping}.get(method)
            replaced = wrap(original) if wrap is not None else self._within(phase, original)
            object.__setattr__(self._engine, method, replaced)
            self._patched.append(method)

    def _within(self, phase: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def followed(*args: Any, **kwargs: Any) -> Any:
            before = self._peaks.phase
            self._enter(phase)
            try:
                result = original(*args, **kwargs)
            except BaseException as error:
                self._failed(error)
                raise
            if phase not in _LASTING:
                self._enter(None if phase == c.STEP else before)
            return result

        return followed

    def _forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        training = self._within(c.FORWARD, original)

        def followed(*args: Any, **kwargs: Any) -> Any:
            if not self._engine.module.training:
                with self.phase(c.EVAL):
                    return original(*args, **kwargs)
            if self._step_began is None:
                self._step_begins(args, kwargs)
            return training(*args, **kwargs)

        return followed

    def _stepping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        within = self._within(c.STEP, original)

        def followed(*args: Any, **kwargs: Any) -> Any:
            last = self._engine.is_gradient_accumulation_boundary()
            result = within(*args, **kwargs)
            if last:
                self._step_ends()
            return result

        return followed

    def _failed(self, error: BaseException) -> None:
        self._explainer.explain(error)
        self._drop_trace(error)

    def _drop_trace(self, error: BaseException) -> None:
        """End a trace in the middle of its step: what it has is no record of one."""
        if self._trace is not None:
            trace, self._trace = self._trace, None
            with contextlib.suppress(Exception):
                trace.__exit__(type(error), error, error.__traceback__)
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _step_begins(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        began = time.perf_counter()
        self._step_began = began
        self._explainer.step = self._steps + 1
        if self._seq_len == 0:
            # The toolkit's own models take one token more, the last one's target.
            self._seq_len = _sequence_length((*args, *kwargs.values())) - isinstance(self._engine.module, CausalLM)
            self._explainer.setup = self._setup(self._seq_len)
        if not self._closed and self._level == "full" and self._steps + 1 == self._traced_step:
            self._start_trace()
        self._cost += time.perf_counter() - began

    def _start_trace(self) -> None:
        trace = StepTrace(self._engine.module, self._head, self._inventory, on_gpu=self._on_gpu)
        try:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(stacks="python")
            trace.__enter__()
        except Exception as error:  # such as a profiler of the user's that runs already
            logger.warning("memory: step %d cannot be traced: %s: %s", self._steps + 1, type(error).__name__, error)
            return
        self._trace = trace

    def _step_ends(self) -> None:
        began = time.perf_counter()
        self._steps += 1
        seconds = began - (self._step_began or began)
        self._step_began = None
        if self._closed:
            return
        if self._trace is not None:
            trace, self._trace = self._trace, None
            self._finish_trace(trace)
            # Tracing slows the step itself down, too.
            typical = statistics.median(self._durations[1:] or self._durations or [seconds])
            self._cost += max(0.0, seconds - typical)
        else:
            self._durations.append(seconds)
            del self._durations[:-50]
        if self._steps == 2:  # the optimizer has its state by now
            self._count_by_category()
        if self._steps in (2, self._traced_step) or began - self._written > WRITE_SECONDS:
            self._write()
        self._cost += time.perf_counter() - began

    def _finish_trace(self, trace: StepTrace) -> None:
        try:
            trace.__exit__(None, None, None)
            curve = trace.curve
            self._timeline = curve.timeline(trace.storages.nanoseconds)
            self._traced_phases = {phase.name: phase for phase in curve.by_phase()}
            self._largest_tensors = largest_tensors(trace.storages.lifetimes, curve, curve.peak_at)
            self._resident = curve.at(len(curve.total) - 1)
            path = self._folder / FOLDER / f"rank{self._explainer.rank}-snapshot.pickle"
            if self._on_gpu:
                snapshot.write_cuda(path)
                torch.cuda.memory._record_memory_history(enabled=None)
            else:
                snapshot.write(path, snapshot.of_step(trace.storages.lifetimes, trace.storages.nanoseconds or []))
        except Exception as error:  # measuring must not end a run
            logger.warning("memory: the traced step could not be written down: %s: %s", type(error).__name__, error)

    def _count_by_category(self) -> None:
        here, self._host, largest = by_category(self._inventory(), self._engine.device.type)
        if self._timeline is not None:
            return  # the trace has them, and more
        self._resident, self._largest_tensors = here, largest
        if isinstance(self._watermark, CachingAllocator):
            workspaces = self._watermark.workspaces()
            rest = self._watermark.now() - sum(here.values())
            self._resident = here | {c.WORKSPACES: workspaces, c.OTHER: max(0, rest)}

    # ---- the record -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Write the record and let go of the engine; calling it again does nothing."""
        for method in self._patched:
            with contextlib.suppress(AttributeError):
                object.__delattr__(self._engine, method)
        self._patched.clear()
        if sys.excepthook == self._uncaught:
            sys.excepthook = self._hook
        if self._closed:
            return
        self._enter(None)
        self._closed = True
        atexit.unregister(self.close)
        self._drop_trace(KeyboardInterrupt())
        if self._level == "full" and self._timeline is None:
            logger.warning("memory: the run ended before step %d, which was to be traced", self._traced_step)
        if self._steps:  # else the record is the one that it began with
            if not self._resident:
                self._count_by_category()
            self._write()

    def _write(self) -> None:
        self._written = time.perf_counter()
        with contextlib.suppress(OSError):
            write_record(self._folder, measured_name(self._explainer.rank), self.record())

    def record(self) -> Measurement:
        """What has been measured so far."""
        phases = self._peaks.records(self._traced_phases)
        known = [phase for phase in phases if phase.peak is not None]
        largest = max(known, key=lambda phase: phase.peak or 0, default=None)
        allocator = self._watermark.state() if isinstance(self._watermark, CachingAllocator) else None
        source = self._watermark.source
        if self._timeline is not None and not self._on_gpu:
            source = "torch's CPU allocator" if counted() else "named tensors (torch's CPU allocator kept no count)"
        assert self._level != "off"
        return Measurement(
            setup=self._explainer.setup or self._setup(self._seq_len),
            rank=self._explainer.rank,
            host=host(),
            device_name=torch.cuda.get_device_name(self._engine.device) if self._on_gpu else "cpu",
            level=self._level,
            source=source,
            step=self._traced_step if self._timeline is not None else None,
            peak=largest.peak if largest is not None else None,
            peak_phase=largest.name if largest is not None else None,
            phases=phases,
            resident=self._resident,
            host_memory=self._host,
            limit=self._explainer.limit,
            timeline=self._timeline,
            blocks=self._largest_tensors,
            allocator=allocator,
            largest_resident_set=None if self._on_gpu else self.largest,
            process=None if self._on_gpu else self._explainer.at_start,
            overhead_seconds=self._cost,
            steps=self._steps,
        )


def _sequence_length(inputs: Iterable[Any]) -> int:
    """Predictions of a sequence, from the first batch of token numbers; 0 if there is none."""
    for value in inputs:
        if isinstance(value, dict):
            if found := _sequence_length(value.values()):
                return found
        elif isinstance(value, Tensor) and value.dim() >= 2 and not value.is_floating_point():
            return int(value.shape[-1])
    return 0
