"""`toolkit.memory.watch`: a ledger for a DeepSpeed engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.memory.ledger import TRACED_STEP, Ledger, Level
from toolkit.memory.out_of_memory import Explainer
from toolkit.records.by_category import by_category


def watch(
    engine: Any,
    run_dir: str | Path,
    level: Level = "summary",
    *,
    model: str = "",
    seq_len: int | None = None,
    step: int = TRACED_STEP,
    explainer: Explainer | None = None,
) -> Ledger:
    """Measure what `engine` holds, by phase and category, into `run_dir`/memory/rank<n>.json.

    Args:
        engine: that `deepspeed.initialize` or `toolkit.initialize` returned.
        run_dir: made if missing. One run, one folder.
        level: "off", "summary" or "full"; see docs/memory-profiling.md for the cost. On a CPU "full" counts from
            `toolkit.memory.count_from_here()` on: call that before the model is built.
        model: its name, for the record; by default that of its class.
        seq_len: predictions of a sequence; by default read off the first batch.
        step: which one "full" traces, from 1.
        explainer: where memory that runs out is explained; by default one for `run_dir`.

    Raises:
        ValueError: an unknown level.
        OSError: the folder cannot be made.
    """
    # DeepSpeed is loaded where there is an engine; `toolkit.memory` does without it.
    from toolkit.zero.describe import describe
    from toolkit.zero.inventory import inventory

    if level not in ("off", "summary", "full"):
        raise ValueError(f"level is {level!r}, but it must be off, summary or full.")
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if explainer is None:
        here, _, _ = by_category(inventory(engine), engine.device.type)
        explainer = Explainer(folder, int(engine.global_rank), engine.device, named_already=sum(here.values()))
    return Ledger(
        engine,
        folder,
        level,
        inventory=lambda: inventory(engine),
        setup=lambda length: describe(engine, model=model, seq_len=length),
        explainer=explainer,
        seq_len=seq_len,
        step=step,
    )
