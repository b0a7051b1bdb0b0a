"""The content of summary.json."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolkit.agreed import everyones
from toolkit.errors import UserError
from toolkit.records.memory import FOLDER as MEMORY_FOLDER
from toolkit.records.run import CHECKPOINTS, LAST_STEPS, METRICS, PLOT, SUMMARY, tokens_of
from toolkit.run import ranks
from toolkit.run.bad_documents import document_counts
from toolkit.run.folder import RunFolder
from toolkit.run.prepare import PreparedRun
from toolkit.run.screen import Screen
from toolkit.run.start import Start

if TYPE_CHECKING:
    import torch

    from toolkit.data import Position
    from toolkit.memory.ledger import Ledger
    from toolkit.memory.out_of_memory import Explainer

MEASURED = "measured"
"""The fact of a run's last checkpoint that `Measured` is read from."""
_Count = Annotated[int, Field(ge=0)]


class Measured(BaseModel):
    """What of a summary only the process of the run knows: its last checkpoint notes it, for a summary that the disk
    had no room for."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    peak_memory_bytes: _Count
    """Of the largest rank; `process_bytes` of it were held before there was a model: Python and libraries, on a CPU."""
    process_bytes: _Count
    memory_kind: str
    skipped_documents: _Count
    skipped_documents_first: list[str]
    replaced_characters: _Count
    cut_conversations: _Count
    predicted_peak_bytes: _Count | None
    state_bytes_by_name: dict[str, _Count]
    """On rank 0."""
    trained_parameters: _Count | None = None
    """Elements of those that the optimizer trains; None of a run of an older version, which divided by all."""
    state_bytes_per_parameter: float
    """Of those that are trained."""
    state_bytes_per_parameter_per_rank: float
    counted_peak_bytes: _Count | None = None
    """Of the model and its steps, on a CPU where a step was traced; on a GPU the peak is theirs."""
    collective_bytes: dict[str, _Count] = {}
    """Of several ranks: what rank 0 put into collectives in its last step, by kind."""
    forward_seconds: list[float] = []
    """By rank, where all have it."""


def measure(
    prepared: PreparedRun,
    engine: Any,
    ledger: Ledger,
    explainer: Explainer,
    read_to: Position,
    sent: dict[str, int],
    forward: float | None,
) -> Measured:
    """What the processes of a run have measured so far, the same on every rank; every rank must call this.

    Args:
        ledger: has this rank's peak.
        explainer: knows what this rank held before there was a model, and what was predicted.
        read_to: how far the data have been read for the steps that were made.
        sent: bytes that this rank put into collectives in its last step, by kind.
        forward: seconds of this rank's median step for what it does alone.
    """
    import torch

    from toolkit.zero.engine import optimizer_state_bytes, replicated_bytes

    states = optimizer_state_bytes(engine)
    mine, whole = sum(states.values()), replicated_bytes(engine)
    [mean], [largest] = ranks.mean_max([mine - whole], [mine], engine.device)
    peak, before = max(everyones((ledger.largest, explainer.at_start)))  # both of the rank that has the peak
    counted = [found for found in everyones(ledger.counted) if found is not None]
    trained = trained_parameters(engine.module)
    size, alone = prepared.batch.world_size, [seconds for seconds in everyones(forward) if seconds is not None]
    found = Measured(
        peak_memory_bytes=peak,
        process_bytes=before,
        memory_kind="allocated on the accelerator" if torch.accelerator.is_available() else "resident",
        **document_counts(read_to),
        counted_peak_bytes=max(counted, default=None),
        predicted_peak_bytes=explainer.predicted.peak if explainer.predicted is not None else None,
        state_bytes_by_name=states,
        trained_parameters=trained,
        state_bytes_per_parameter=(mean * size + whole) / trained,
        state_bytes_per_parameter_per_rank=largest / trained,
        collective_bytes=sent if size > 1 else {},
        forward_seconds=alone if 1 < size == len(alone) else [],
    )
    return ranks.from_first(found)


def trained_parameters(module: torch.nn.Module) -> int:
    """Elements of the parameters that are trained, whole ones also where a rank holds a part (ZeRO 3)."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)


def summarize(prepared: PreparedRun, records: list[dict[str, Any]], measured: Measured | None) -> dict[str, Any]:
    """What summary.json says of a run that has ended.

    Args:
        records: the lines of metrics.jsonl, those of earlier starts of the run among them.
        measured: None where nobody knows it any more; its fields are absent then.
    """
    final = [record["loss"] for record in records[-LAST_STEPS:]]
    validated = [record["val_loss"] for record in records if "val_loss" in record]
    seconds = [record["step_time_s"] for record in records]
    flops, mfu = ([record[name] for record in records if name in record] for name in ("flops_per_s", "mfu"))
    return {
        "run_dir": str(prepared.folder),
        "interrupted": records[-1]["step"] < prepared.settings.steps,
        "diverged": _skipped_at_the_end(records) >= prepared.settings.max_skipped,
        "steps": len(records),
        "skipped_steps": sum(record["skipped"] for record in records),
        "tokens": sum(map(tokens_of, records)),
        "seconds": sum(seconds),
        "compile_s": sum(record.get("compile_s", 0.0) for record in records),
        "loss": None if None in final else statistics.fmean(final),
        "loss_steps": len(final),
        "val_loss": validated[-1] if validated else None,
        # The median: a machine that others use has slow moments.
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in records),
        "flops_per_s": statistics.median(flops) if flops else None,
        "mfu": statistics.median(mfu) if mfu else None,
        "data_seconds": sum(record.get("data_seconds", 0.0) for record in records),
        "memory_files": str(prepared.folder / MEMORY_FOLDER) if prepared.settings.memory_profile != "off" else None,
        "parameters": prepared.parameters,
        **(measured.model_dump(exclude_defaults=True) if measured is not None else {}),
    }


def written_again(prepared: PreparedRun, folder: RunFolder, start: Start, screen: Screen) -> dict[str, Any] | None:
    """The summary of a run that has no step left to make; where it or the loss curve is missing, they are written now.

    None: `start` is of another run.

    Raises:
        UserError: they cannot be written.
    """
    if start.source is None or start.source.folder.resolve().parent != (folder.folder / CHECKPOINTS).resolve():
        return None
    records, _ = folder.records(start.step)
    kept = folder.summary()
    whole = kept is not None and (kept.get("steps"), kept.get("interrupted")) == (len(records), False)
    if not records or (whole and (folder.folder / PLOT).exists()):
        return kept
    measured = _measured(start)
    summary = kept if kept is not None and whole else summarize(prepared, records, measured)
    if (problem := folder.write_end(summary, records)) is not None:
        raise UserError(problem)
    if summary is kept:
        screen.say(f"note: {PLOT} was missing, and is drawn now.")
        return kept
    unknown = f"; the checkpoint does not say what else was measured: {SUMMARY} is made of {METRICS} alone"
    alone = unknown if measured is None else ""
    screen.say(f"note: {SUMMARY} and {PLOT} were not written when the run ended, and are now{alone}.")
    screen.summary(summary)
    return summary


def _measured(start: Start) -> Measured | None:
    """What the checkpoint of a run's end notes; None of one that was saved earlier, or by an older version."""
    try:
        return Measured.model_validate(start.source.manifest.facts.get(MEASURED) if start.source is not None else None)
    except ValidationError:
        return None


def peak_of_ranks(device: torch.device, computed: str, world_size: int, tflops: float | None) -> float | None:
    """Operations a second that all ranks' devices can do in the dtype that is computed in; None: not known.

    `tflops`: 1e12 operations a second of each, if somebody has said so.
    """
    import torch

    from toolkit.models import peak_flops

    if tflops is not None:
        return tflops * 1e12 * world_size
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return peak * world_size if peak is not None and computed in ("bf16", "fp16") else None


def _skipped_at_the_end(records: list[dict[str, Any]]) -> int:
    return next((n for n, record in enumerate(reversed(records)) if not record["skipped"]), len(records))
