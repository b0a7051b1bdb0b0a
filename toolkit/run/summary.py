"""The content of summary.json."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from toolkit.agreed import everyones
from toolkit.records.memory import FOLDER as MEMORY_FOLDER
from toolkit.records.run import LAST_STEPS, tokens_of
from toolkit.run import ranks
from toolkit.run.bad_documents import document_counts
from toolkit.run.prepare import PreparedRun

if TYPE_CHECKING:
    import torch

    from toolkit.data import Position


def summarize(
    prepared: PreparedRun, engine: Any, records: list[dict[str, Any]], read_to: Position, memory: int, process: int
) -> dict[str, Any]:
    """What summary.json says of a run that has ended; every rank must call this.

    Args:
        records: the lines of metrics.jsonl, those of earlier starts of the run among them.
        read_to: how far the data have been read for the steps that were made.
        memory: bytes at this rank's peak.
        process: bytes of them that this rank held before there was a model: Python and libraries, on a CPU.
    """
    import torch

    from toolkit.zero.engine import optimizer_state_bytes, replicated_bytes

    states = optimizer_state_bytes(engine)
    mine, whole = sum(states.values()), replicated_bytes(engine)
    [mean], [largest] = ranks.mean_max([mine - whole], [mine], engine.device)
    peak, before = max(everyones((memory, process)))  # both of the rank that has the peak
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
        "flops_per_s": statistics.median(flops),
        "mfu": statistics.median(mfu) if mfu else None,
        "data_seconds": sum(record.get("data_seconds", 0.0) for record in records),
        "peak_memory_bytes": peak,
        "process_bytes": before,
        "memory_kind": "allocated on the accelerator" if torch.accelerator.is_available() else "resident",
        "memory_files": str(prepared.folder / MEMORY_FOLDER) if prepared.settings.memory_profile != "off" else None,
        "parameters": prepared.parameters,
        **document_counts(read_to),
        "state_bytes_by_name": states,
        "state_bytes_per_parameter": (mean * prepared.batch.world_size + whole) / prepared.parameters,
        "state_bytes_per_parameter_per_rank": largest / prepared.parameters,
    }


def peak_of_ranks(device: torch.device, computed: str, world_size: int) -> float | None:
    """Operations a second that all ranks' devices can do in the dtype that is computed in; None: not known."""
    import torch

    from toolkit.models import peak_flops

    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return peak * world_size if peak is not None and computed in ("bf16", "fp16") else None


def _skipped_at_the_end(records: list[dict[str, Any]]) -> int:
    return next((n for n, record in enumerate(reversed(records)) if not record["skipped"]), len(records))
