"""Memory of a training run: predicted before it, watched during it, explained where it runs out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from toolkit.agreed import everyones
from toolkit.errors import UserError
from toolkit.run import heap, ranks
from toolkit.run.prepare import PreparedRun
from toolkit.run.stopping import OUT_OF_MEMORY, abandon

if TYPE_CHECKING:
    import torch

    from toolkit.memory.ledger import Ledger
    from toolkit.memory.out_of_memory import Explainer
    from toolkit.records.memory import Change, Prediction

_RISKY = 0.5
"""Share of a limit: of a run that is predicted to need more, it is computed beforehand what would change that, and on a
CPU the C library is told to keep nothing that was freed."""


class Forecast:
    """What this run will hold, predicted on rank 0 and written to memory/predicted.json; with it, what would change it.

    The latter takes seconds, and is computed before the run only where memory may run out.
    """

    def __init__(self, prepared: PreparedRun, device: torch.device) -> None:
        from toolkit.estimate.predict import Case, Estimator

        self.prediction: Prediction | None = None
        settings, batch = prepared.settings, prepared.batch
        self._folder, self._remarks = prepared.folder, prepared.remarks
        self._estimator = Estimator()
        if ranks.rank() != 0 or settings.memory_profile == "off":
            return
        with self._refusals():
            self._case = Case(
                model=settings.model,
                config=prepared.config,
                world_size=batch.world_size,
                micro_batch=batch.micro,
                accumulation=batch.accumulation,
                seq_len=settings.seq_len,
                device=device.type,
                activations=settings.activations,
                loss=settings.loss,
                lora=settings.lora,
                conversations=prepared.data.documents.conversations,
            )
            self.prediction = self._estimator.predict(self._case)
            self._write(self.prediction)

    def changes(self) -> list[Change]:
        """What would change it, on every rank; all must call this."""
        found = self.prediction
        if found is not None and not found.changes:
            with self._refusals():
                found.changes = self._estimator.changes(self._case, found.peak)
                self._write(found)
        return ranks.from_first(found.changes if found is not None else [])

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a model or optimizer that it does not know; the run may be fine
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._remarks.append(f"the memory of this run could not be predicted: {reason}")

    def _write(self, prediction: Prediction) -> None:
        from toolkit.records.memory import PREDICTED, write_record

        write_record(self._folder, PREDICTED, prediction)


def make_explainer(prepared: PreparedRun, device: torch.device, forecast: Forecast) -> Explainer:
    """What explains memory that runs out, with the prediction that it needs before there is none left."""
    from toolkit.memory.out_of_memory import Explainer

    predicted = ranks.from_first(forecast.prediction)
    explainer = Explainer(prepared.folder, ranks.rank(), device, predicted=predicted)
    # A limit may be on one rank only, and only rank 0 is heard.
    warnings = everyones(explainer.warning())
    prepared.remarks += [f"rank {rank}: {warning}" for rank, warning in enumerate(warnings) if warning][:1]
    if any(everyones(explainer.share() > _RISKY)):
        if device.type == "cpu":
            heap.map_large()
        explainer.take_changes(forecast.changes())
    return explainer


def watch_memory(prepared: PreparedRun, engine: Any, explainer: Explainer) -> Ledger:
    """The run's ledger, which measures as much as --memory-profile says."""
    from toolkit import memory

    settings = prepared.settings
    return memory.watch(
        engine,
        prepared.folder,
        settings.memory_profile,
        model=settings.model,
        seq_len=settings.seq_len,
        explainer=explainer,
    )


def memory_now(ledger: Ledger) -> int:
    """Bytes this rank holds: the accelerator's peak of allocations so far, or the resident set on a CPU."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return ledger.largest
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    return psutil.Process().memory_info().rss


def end_if_out_of_memory(error: Exception) -> None:
    """End this rank with a line if `error` is that memory ran out before the run had a folder to explain it in."""
    from toolkit.memory.out_of_memory import failed_allocation

    if (cause := failed_allocation(error)) is not None:
        words = f"error: rank {ranks.rank()} ran out of memory before the run began: {type(cause).__name__}: {cause}"
        print(words.splitlines()[0], file=sys.stderr)
        abandon(OUT_OF_MEMORY)
