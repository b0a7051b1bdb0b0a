"""Where a run begins: at step 0, or after a checkpoint that is checked before it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.agreed import agreed, everyones
from toolkit.errors import UserError
from toolkit.records.run import CHECKPOINTS, METRICS, read_metrics
from toolkit.records.sizes import counted
from toolkit.run import ranks
from toolkit.run.identity import check_same
from toolkit.run.settings import AUTO, NONE, RunSettings
from toolkit.run.terms import Saved

if TYPE_CHECKING:
    from toolkit.checkpoint.source import Source
    from toolkit.data import Position


@dataclass
class Start:
    """A run begins after `step`; `source` is the checkpoint, None at step 0. `remarks` are for the user."""

    step: int = 0
    source: Source | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def position(self) -> Position | None:
        """Where the data continue; None is the beginning."""
        from toolkit.data import Position

        position = self.source.manifest.facts.get("position") if self.source is not None else None
        return Position(**position) if position else None

    @property
    def saved(self) -> Saved | None:
        """What the checkpoint notes of its run; DeepSpeed's own say how large a step was."""
        if self.source is None:
            return None
        facts = self.source.manifest.facts
        if "global_batch" not in facts:
            states = self.source.model_states()
            facts = facts | {"global_batch": _stock_batch(states.get("ds_config"), states.get("dp_world_size"))}
        return Saved.of(facts)


def _stock_batch(config: Any, world_size: Any) -> int | None:
    """Sequences of a step by the config in a checkpoint of DeepSpeed's; None where it leaves that open."""
    if not isinstance(config, Mapping):
        return None
    total, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    if isinstance(total, int):
        return total
    accumulation = config.get("gradient_accumulation_steps", 1)
    known = all(isinstance(part, int) for part in (micro, accumulation, world_size))
    return micro * accumulation * world_size if known else None


def run_of(settings: RunSettings) -> Path | None:
    """The folder of the run that --resume names, or None where it names a checkpoint, or nothing."""
    path = Path(settings.resume)
    named = settings.resume not in (AUTO, NONE) and (path / CHECKPOINTS).is_dir()
    return path if named else None


def newest_saved(settings: RunSettings, folder: Path) -> Saved | None:
    """What the checkpoint that will be resumed says of its run; None where there is none, or it says nothing.

    Reads manifests only. `find_start` compares the files with their hashes, once all else has been checked.
    """
    from toolkit.checkpoint import manifest as manifests
    from toolkit.checkpoint.store import Store, pointed

    if settings.resume == NONE:
        return None
    named = run_of(settings) or (folder if settings.resume == AUTO else None)
    store = Store(named / CHECKPOINTS) if named is not None else None
    given = Path(settings.resume)
    for path in [pointed(given) or given] if store is None else map(store.path, store.steps()):
        try:
            return Saved.of(manifests.read(path).facts)
        except UserError:  # damaged, or DeepSpeed's own; an older one may be whole
            continue
    return None


def find_start(settings: RunSettings, folder: Path, identity: dict[str, dict[str, Any]]) -> Start:
    """Choose the checkpoint that a run begins with; every rank must call this.

    Checks files against their hashes, which the ranks divide among themselves.

    Raises:
        UserError: the checkpoint that --resume names is damaged or does not exist; all checkpoints are damaged; the
            chosen one is of another model, tokenizer or data.
    """
    start = _choose(settings, folder)
    if start.source is not None:
        check_same(start.source.manifest.facts.get("identity"), identity, start.source.folder)
    return start


def _checkpoint_named(given: Path) -> Path:
    """The checkpoint that is `given`, or that the file `latest` in it names. Raises UserError where it is none."""
    from toolkit.checkpoint.store import pointed
    from toolkit.checkpoint.wrong import is_checkpoint, not_a_checkpoint

    path = pointed(given) or given
    if not path.is_dir() or not is_checkpoint(path):
        raise UserError(f"--resume {given}: {not_a_checkpoint(given)}")
    return path


def _choose(settings: RunSettings, folder: Path) -> Start:
    from toolkit.checkpoint import manifest as manifests
    from toolkit.checkpoint.source import Source
    from toolkit.checkpoint.store import Store
    from toolkit.checkpoint.universal import open_checkpoint

    if settings.resume == NONE:
        return Start()
    named = run_of(settings) or (folder if settings.resume == AUTO else None)
    if named is not None:
        store = Store(named / CHECKPOINTS)
        damaged: list[str] = []
        for step in ranks.from_first(agreed(store.steps)):
            problem = _problem(store.path(step), step)
            if problem is None:
                remark = [f"{'; '.join(damaged)}; taken is {store.path(step).name}."] if damaged else []
                return _begin(Source(store.path(step)), folder, remark)
            damaged.append(problem)
        if damaged:
            raise UserError(f"every checkpoint in {store.folder} is damaged: {'; '.join(damaged)}.")
        if settings.resume != AUTO:
            raise UserError(f"--resume {settings.resume}: the run there has no checkpoint yet.")
        return _from_the_start(settings, folder)
    path = agreed(lambda: _checkpoint_named(Path(settings.resume)))
    problem = _problem(path) if ranks.from_first((path / manifests.NAME).exists()) else None
    if problem is not None:
        raise UserError(f"--resume {settings.resume}: {problem}.")
    source = agreed(lambda: open_checkpoint(path, trust_pickle=settings.trust_pickle))
    return _begin(source, folder, [])


def _from_the_start(settings: RunSettings, folder: Path) -> Start:
    """Step 0, unless steps are in `folder` whose checkpoints somebody must have removed."""
    metrics = folder / METRICS
    made = len(read_metrics(metrics)) if metrics.exists() else 0
    if made > max(settings.save_every, 1):  # one was in place before the step after
        raise UserError(
            f"the run in {folder} has made {counted(made, 'step')} and has no checkpoint; give another "
            "--run-dir to begin anew."
        )
    return Start()


def _begin(source: Source, folder: Path, remarks: list[str]) -> Start:
    from toolkit.checkpoint.store import Store

    step = source.manifest.step
    own = Store(folder / CHECKPOINTS)
    newest = max(own.steps(), default=0)
    if source.folder.resolve().parent == own.folder.resolve() and newest > step and not remarks:
        raise UserError(
            f"--resume names step {step}, but the run in {folder} has a checkpoint of step {newest}; to resume from an "
            "earlier one, give a new --run-dir"
        )
    return Start(step, source, remarks)


def _problem(path: Path, step: int | None = None) -> str | None:
    """What is wrong with the checkpoint in `path`, the first that any rank finds. `step`: as its name has it.

    Raises:
        UserError: another version wrote it, so that it is not for this one to call it damaged.
    """
    from toolkit.checkpoint import manifest as manifests
    from toolkit.checkpoint.universal import open_checkpoint

    share = (ranks.rank(), ranks.world_size())
    mine = foreign = None
    try:
        manifest = manifests.read(path)
        mine = manifests.damage(path, manifest, share=share)
        if step is not None and manifest.step != step:
            mine = f"{path / manifests.NAME} is of step {manifest.step}"
        if mine is None:
            open_checkpoint(path).check(share)
    except manifests.UnknownFormat as error:
        foreign = str(error)
    except manifests.NotUnderstood as error:
        foreign = f"{error}; resume with that version"
    except UserError as error:
        mine = str(error)
    everyone = everyones((mine, foreign))
    for _, found in everyone:
        if found is not None:
            raise UserError(f"{found}, or give another --run-dir.")
    return next((found for found, _ in everyone if found is not None), None)
