"""The state that a run resumes with, what saves its checkpoints, and what these note of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from toolkit.records.run import CHECKPOINTS
from toolkit.run import ranks
from toolkit.run.saving import Saver, restore_random_states
from toolkit.run.start import Start
from toolkit.run.terms import saved_facts

if TYPE_CHECKING:
    from toolkit.data import Position
    from toolkit.run.prepare import PreparedRun


def restore(prepared: PreparedRun, engine: Any, start: Start, say: Callable[[str], None]) -> None:
    """Give `engine` and this process the state that `start` names; every rank must call this.

    Raises:
        UserError: the checkpoint's state is kept otherwise, and --convert-state was not given.
    """
    from toolkit.zero.checkpoint import load

    source = start.source
    if source is None:
        return
    base = prepared.identity["model"].get("base", {}).get("sha256")
    for remark in load(engine, source, convert=prepared.settings.convert_state, base=base):
        say(f"note: {remark}.")
    extra = source.extra(ranks.rank()) or source.extra(0)
    if extra is not None:
        restore_random_states(extra.get("random", {}))
    if start.position is None:
        say("note: the checkpoint says nothing of the data: they are read from the beginning.")
    say(f"resumed from {source.folder}, after step {start.step}")


def make_saver(prepared: PreparedRun, engine: Any, start: Start, say: Callable[[str], None]) -> Saver | None:
    """What saves the run's checkpoints, or None, said if it is not what was asked for."""
    from toolkit.checkpoint.store import Store
    from toolkit.zero.checkpoint import refusal

    settings = prepared.settings
    if settings.save_every == 0:
        return None
    problem = refusal(engine)
    if problem is not None:
        say(f"note: no checkpoints are saved: {problem}.")
        return None
    store = Store(prepared.folder / CHECKPOINTS, keep_last=settings.keep_last, keep_every=settings.keep_every)
    # Those of the checkpoint that the run resumes from: what lies beside the model may have changed since.
    kept = start.source.model_files() if start.source is not None else {}
    files = {name: path.read_bytes() for name, path in kept.items()} or prepared.model_files
    saver = Saver(engine, store, files, base="base" in prepared.identity["model"])
    saver.begin(start.source)
    return saver


def checkpoint_facts(prepared: PreparedRun, position: Position) -> dict[str, Any]:
    """What a checkpoint notes of the run."""
    return {
        "position": asdict(position),
        "identity": prepared.identity,
        "validation": prepared.validation_text,
        "global_batch": prepared.batch.total,
        "run": saved_facts(prepared.settings, prepared.config, prepared.batch),
    }
