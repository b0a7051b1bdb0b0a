"""Memory of a training run: predicted before it, watched during it, explained where it runs out."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from toolkit.agreed import AgreedError, everyones
from toolkit.errors import UserError
from toolkit.records.sizes import size_text
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
    """What explains memory that runs out, with the prediction that it needs before there is none left.

    Raises:
        AgreedError: the run is predicted not to fit, and --start-anyway is not given.
    """
    from toolkit.memory.out_of_memory import Explainer

    predicted = ranks.from_first(forecast.prediction)
    explainer = Explainer(prepared.folder, ranks.rank(), device, predicted=predicted)
    # A limit may be on one rank only, and only rank 0 is heard.
    refusals = _of_ranks(explainer.warning(surely=True))
    if refusals and not prepared.settings.start_anyway:
        raise AgreedError(f"{refusals[0].removesuffix('.')}; --start-anyway starts it all the same.")
    prepared.remarks += _of_ranks(explainer.warning())[:1]
    if any(everyones(explainer.share() > _RISKY)):
        if device.type == "cpu":
            heap.map_large()
        explainer.take_changes(forecast.changes())
    return explainer


def _of_ranks(mine: str | None) -> list[str]:
    return [f"rank {rank}: {said}" for rank, said in enumerate(everyones(mine)) if said]


def machines(explainer: Explainer) -> list[str]:
    """Which ranks are on which machine, and what each rank may have, in a line for each of several machines."""
    return placement(everyones((socket.gethostname(), explainer.limit)))


def placement(found: Sequence[tuple[str, int | None]]) -> list[str]:
    """The lines, from each rank's machine and limit of memory in bytes."""
    hosts: dict[str, list[int]] = {}
    for rank, (host, _) in enumerate(found):
        hosts.setdefault(host, []).append(rank)
    if len(hosts) < 2:
        return []
    lines = []
    for host, members in hosts.items():
        limits = [limit for rank in members if (limit := found[rank][1]) is not None]
        most = f", at most {size_text(min(limits))} for each" if limits else ""
        whole = members == list(range(members[0], members[-1] + 1)) and len(members) > 1
        shown = f"{members[0]} to {members[-1]}" if whole else ", ".join(map(str, members))
        lines.append(f"{host}: rank{'s' if len(members) > 1 else ''} {shown}{most}")
    return lines


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
