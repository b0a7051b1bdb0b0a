"""What every command below `toolkit bench` does before and after it measures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from toolkit.errors import UserError
from toolkit.plugins import import_plugins

if TYPE_CHECKING:
    from toolkit.bench.record import Record
    from toolkit.bench.step import Measured

_SLOWER = 1
OPTIONS = {
    "step": ("optimizers", "parameters", "model", "baseline", "repeats", "threads", "device", "growth"),
    "train": (
        *("methods", "baseline", "model", "data", "seq_len", "micro_batch", "grad_accum"),
        *("steps", "rounds", "ranks", "zero_stage", "threads", "compile_model", "peak_tflops"),
    ),
    "data": ("data", "tokenizer", "model", "seq_len", "micro_batch", "batches", "step_ms", "repeats", "threads"),
    "save": ("methods", "model", "steps", "repeats", "ranks", "zero_stage", "threads", "folder"),
}
"""Options that are kept with what was measured. Plug-ins are not: a file must not say which code is run."""
UNFINISHED = "The benchmark had not ended when this was written: there was more to measure."


def say(words: str) -> None:
    typer.echo(words, err=True)


def listed(text: str) -> list[str]:
    """The entries of an option that takes several, parted by commas."""
    return [entry for part in text.split(",") if (entry := part.strip())]


class Call:
    """One call of a command below `bench`: what all of them do before and after they measure."""

    def __init__(
        self,
        ctx: typer.Context,
        threads: int | None,
        device: Literal["cpu", "cuda"] | None,
        plugins: list[Path] | None,
        json_to: str | None,
        against: Path | None,
        anyway: bool,
        tolerance: float,
    ) -> None:
        from toolkit.bench.record import check_place, load_average, now, read

        if json_to not in (None, "-"):
            check_place(Path(json_to), "--json")
        self._load, self._began = load_average(), now()
        self._ctx, self._json_to, self._against, self._tolerance = ctx, json_to, against, tolerance
        self._anyway = anyway
        self._draft: Path | None = None
        self._before = None if against is None else read(against)
        self._settings: dict[str, Any] = {}
        _prepare(threads)
        import_plugins(plugins)
        self.device = _device(device)
        self.threads = int(os.environ["OMP_NUM_THREADS"])

    def begin(self, settings: dict[str, Any]) -> None:
        """Nothing is measured yet. Raises UserError where the earlier record is not of the same."""
        from toolkit.bench.against import check
        from toolkit.bench.record import loaded
        from toolkit.bench.step import Measured

        self._settings = settings
        empty = self.record(Measured())
        if self._before is not None and self._against is not None:
            check(self._before, empty, self._against, anyway=self._anyway)
            if UNFINISHED in self._before.notes:
                say(f"warning: {self._against} is of a benchmark that was cut short, and has not all figures.")
        if (warning := loaded(empty)) is not None:
            say(f"warning: {warning}")

    def keep(self, found: Measured) -> None:
        """Write what is found so far where `finish` will write all of it, with a note that it is not all.

        What an earlier call has written there (`--against` may be about to compare with it) stays until then: beside
        it, if there is such a file.
        """
        from toolkit.bench.record import write

        if self._json_to in (None, "-"):
            return
        path = Path(self._json_to)
        if self._draft is None:
            self._draft = path.with_name(f"{path.stem}-unfinished{path.suffix}") if path.exists() else path
            if self._draft != path:
                say(f"{path} stays until the end; until then figures are in {self._draft}")
        record = self.record(found)
        write(record.model_copy(update={"notes": [*record.notes, UNFINISHED]}), self._draft)

    def record(self, found: Measured) -> Record:
        from toolkit.bench.record import WAYS, Record, machine
        from toolkit.run.folder import versions

        name: Any = self._ctx.info_name
        return Record(
            command=name,
            way=WAYS.get(name, 1),
            settings=self._settings,
            options={key: _kept(self._ctx.params[key]) for key in OPTIONS[name]},
            machine=machine(self.device),
            load=self._load,
            began=self._began,
            versions=versions(),
            rows=found.rows,
            left_out=found.left_out,
            notes=found.notes,
        )

    def finish(self, record: Record, baseline: str | None) -> None:
        """Show and write the record, and compare it with the earlier one."""
        from toolkit.bench.against import compare
        from toolkit.bench.record import record_text, write
        from toolkit.bench.show import show, show_changes
        from toolkit.console import PlainConsole

        console = PlainConsole(stderr=self._json_to == "-")
        show(record, console, baseline)  # first: what cannot be written is not lost
        if self._json_to == "-":
            typer.echo(record_text(record), nl=False)
        elif self._json_to is not None:
            path = Path(self._json_to)
            write(record, path)
            if self._draft not in (None, path):
                self._draft.unlink(missing_ok=True)
        if self._before is not None and self._against is not None:
            changes = compare(self._before, record, self._against, self._tolerance)
            show_changes(changes, self._before, record, console, self._against)
            if any(change.slower for change in changes):
                raise typer.Exit(_SLOWER)


def _kept(option: Any) -> Any:
    """As it is in a file: a path that means the same in every folder."""
    return str(option.resolve()) if isinstance(option, Path) else option


def _prepare(threads: int | None) -> None:
    """Before torch is imported: how many threads there are, for it and for what brings an OpenMP of its own."""
    from toolkit.run import leftovers, ranks

    if threads is not None:
        os.environ.update(ranks.with_threads(threads))
    ranks.prepare_environment()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    ranks.settle_accelerator()
    leftovers.own_build_folder()


def of_a_rank(threads: int | None, ranks: int) -> int | None:
    """Threads that each of `ranks` gets: those asked for, those of the environment (None), or a share of the cores.

    Raises UserError for more ranks than this machine has room for.
    """
    from toolkit.records.machine import cores
    from toolkit.run.ranks import check_room, threads_given

    check_room(ranks)
    if threads is not None or threads_given():
        return threads
    return max(1, cores() // ranks)


def _device(asked: Literal["cpu", "cuda"] | None) -> Literal["cpu", "cuda"]:
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UserError("--device is cuda, but torch finds no GPU here.")
    return asked or ("cuda" if there else "cpu")
