"""Memory of a training run: predicted before it, watched during it, explained where it runs out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError
from toolkit.run import ranks
from toolkit.run.prepare import PreparedRun
from toolkit.run.stopping import OUT_OF_MEMORY, abandon

if TYPE_CHECKING:
    import torch

    from toolkit.memory.ledger import Ledger
    from toolkit.memory.out_of_memory import Explainer
    from toolkit.records.memory import Prediction


def make_explainer(prepared: PreparedRun, device: torch.device) -> Explainer:
    """What explains memory that runs out, with the prediction that it needs before there is none left."""
    from toolkit.memory.out_of_memory import Explainer

    predicted = ranks.from_first(_predict(prepared, device) if ranks.rank() == 0 else None)
    explainer = Explainer(prepared.folder, ranks.rank(), device, predicted=predicted)
    # A limit may be on one rank only, and only rank 0 is heard.
    warnings = ranks.everyones(explainer.warning())
    prepared.remarks += [f"rank {rank}: {warning}" for rank, warning in enumerate(warnings) if warning][:1]
    return explainer


def _predict(prepared: PreparedRun, device: torch.device) -> Prediction | None:
    """What this run will hold and what would change it, also written to memory/predicted.json."""
    from toolkit.estimate.predict import Case, Estimator
    from toolkit.records.memory import PREDICTED, write_record

    settings, batch = prepared.settings, prepared.batch
    if settings.memory_profile == "off":
        return None
    case = Case(
        model=settings.model,
        config=prepared.config,
        world_size=batch.world_size,
        micro_batch=batch.micro,
        accumulation=batch.accumulation,
        seq_len=settings.seq_len,
        device=device.type,
        activation_checkpointing=settings.activation_checkpointing,
        loss=settings.loss,
    )
    try:
        predicted = Estimator().predict(case, changes=True)
    except Exception as error:  # of a model or optimizer that it does not know; the run may be fine
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        prepared.remarks.append(f"the memory of this run could not be predicted: {reason}")
        return None
    write_record(prepared.folder, PREDICTED, predicted)
    return predicted


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
