"""The commands `toolkit checkpoint ...` and `toolkit export`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.checkpoint.wrong import is_checkpoint, not_a_checkpoint
from toolkit.errors import UserError, nearest
from toolkit.plugins import Plugins, import_plugins
from toolkit.printable import echo

if TYPE_CHECKING:
    from toolkit.checkpoint.source import Source

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
Where = Annotated[Path, typer.Argument(help="A run (its newest checkpoint is taken) or a checkpoint.")]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Read objects of any class from a checkpoint without manifest: this runs whatever code its files name.",
    ),
]
_SHOWN = 5
"""Files that are not of a checkpoint, at most."""
_LISTED = 20
"""Files of a folder that are shown one by one, at most. (DeepSpeed's universal layout has some for each parameter.)"""


def find(path: Path, step: int | None = None) -> Path:
    """The folder of the checkpoint that `path` means: itself, or of a run that of `step`, the newest for None.

    Raises:
        UserError: there is none.
    """
    from toolkit.checkpoint.store import LATEST, Store, pointed

    for folder in (path / "checkpoints", path):
        steps = Store(folder).steps()
        if steps and step is not None and step not in steps:
            raise UserError(f"{path} has no checkpoint of step {step}, but of {', '.join(map(str, sorted(steps)))}.")
        if steps:
            return Store(folder).path(steps[0] if step is None else step)
        if step is not None:
            continue
        named = pointed(folder)
        if named is not None:
            if not is_checkpoint(named):
                raise UserError(f"{folder / LATEST} names {named.name!r}, which is no checkpoint in {folder}.")
            return named
    if not path.is_dir() or not is_checkpoint(path):
        raise UserError(not_a_checkpoint(path))
    if step is not None:
        raise UserError(f"{path} is one checkpoint: --checkpoint is for a run, which has several.")
    return path


def _open(path: Path, trust_pickle: bool, plugins: Plugins) -> Source:
    from toolkit.checkpoint.universal import open_checkpoint

    import_plugins(plugins)
    return open_checkpoint(find(path), trust_pickle=trust_pickle)


_PLACE = (("epoch", "epoch"), ("window", "window"), ("document", "index"))
"""Of a position in the data, the word and the field."""


@app.command()
def inspect(
    path: Where,
    digest: Annotated[bool, typer.Option("--digest", help="Hash the state, however it is cut.")] = False,
    trust_pickle: TrustPickle = False,
    plugins: Plugins = None,
) -> None:
    """Show what a checkpoint holds, and how large it is."""
    from rich.table import Table

    from toolkit.console import PlainConsole

    source = _open(path, trust_pickle, plugins)
    manifest, sharding = source.manifest, source.origin
    facts: dict[str, Any] = manifest.facts
    at = facts.get("position")
    rows = {
        "folder": source.folder,
        "step": manifest.step,
        "saved": facts.get("saved", "?"),
        "ranks": f"{sharding.world_size} at ZeRO stage {sharding.stage}",
        "optimizer": f"{sharding.rule or 'Adam'}: {', '.join(state.name for state in sharding.states)}",
        "stored as": "; ".join(sorted(_formats(sharding.flats))),
        "parameters": f"{manifest.parameters:,}",
        "not trained": f"{sum(kept.numel() for kept in source.frozen.values()):,} in frozen parameters, "
        f"{sum(buffer.numel() for buffer in source.buffers().values()):,} in buffers",
        "bytes": f"{manifest.bytes:,} ({manifest.bytes / max(manifest.parameters, 1):.2f} per parameter)",
        **{part: entry["name"] for part, entry in facts.get("identity", {}).items()},
        "data continue at": ", ".join(f"{word} {at.get(key, 0)}" for word, key in _PLACE) if at else "?",
        "versions": ", ".join(f"{key} {value}" for key, value in facts.get("versions", {}).items()) or "?",
    }
    if digest:
        rows["digest"] = source.digest()
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    for name, size in _listed({name: int(entry["bytes"]) for name, entry in manifest.files.items()}).items():
        table.add_row("", f"{size:>15,}  {name}")
    console = PlainConsole()
    if not console.is_terminal:  # what a program reads is not cut into lines
        console.width = 1000
    console.print(table)


def _listed(sizes: dict[str, int]) -> dict[str, int]:
    """Files and their bytes as they are shown: those of a folder of many as one line."""
    folders = {name: name.rpartition("/")[0].partition("/")[0] for name in sizes}
    counts = Counter(folders.values())
    shown: dict[str, int] = {}
    for name, folder in sorted(folders.items()):
        many = folder and counts[folder] > _LISTED
        line = f"{folder}/ ({counts[folder]} files)" if many else name
        shown[line] = shown.get(line, 0) + sizes[name]
    return shown


def _formats(flats: Any) -> set[str]:
    found = set()
    for flat in flats:
        states = " ".join(f"{name}={value}" for name, value in flat.formats.items())
        found.add(f"{states} weights={flat.weights if flat.dtype == 'bfloat16' else flat.dtype}")
    return found


@app.command()
def verify(path: Where, plugins: Plugins = None) -> None:
    """Compare every file with the manifest and its hash, of one checkpoint or of all of a run."""
    from toolkit.checkpoint.store import Store

    import_plugins(plugins)
    stores = [Store(folder) for folder in (path / "checkpoints", path) if Store(folder).steps()]
    folders = [stores[0].path(step) for step in stores[0].steps()] if stores else [find(path)]
    damaged = 0
    for folder in folders:
        problems = _problems(folder)
        echo(f"{folder.name}: {'; '.join(problems) or 'intact'}")
        damaged += bool(problems)
    if damaged:
        raise UserError(f"{damaged} of {len(folders)} checkpoints are damaged.")


def _problems(folder: Path) -> list[str]:
    from toolkit.checkpoint import manifest as manifests
    from toolkit.checkpoint.universal import open_checkpoint

    try:
        manifest = manifests.read(folder)
        found = manifests.damage(folder, manifest)
        if found is None:
            open_checkpoint(folder).check()
    except UserError as error:
        return [str(error)]
    problems = [found] if found is not None else []
    extra = manifests.unlisted(folder, manifest)
    problems += [f"{folder / name} is not listed in {manifests.NAME}" for name in extra[:_SHOWN]]
    return problems + ([f"and {len(extra) - _SHOWN} more"] if len(extra) > _SHOWN else [])


@app.command()
def convert(
    path: Where,
    to: Annotated[Path, typer.Option(help="The folder to write: checkpoints go into it as global_step<n>.")],
    ranks: Annotated[int | None, typer.Option(min=1, help="Number of ranks. (default: as it was)")] = None,
    stage: Annotated[int | None, typer.Option(min=1, max=3, help="ZeRO stage. (default: as it was)")] = None,
    universal: Annotated[bool, typer.Option("--universal", help="Write DeepSpeed's universal layout.")] = False,
    trust_pickle: TrustPickle = False,
    plugins: Plugins = None,
) -> None:
    """Rewrite a checkpoint for another number of ranks or stage, or into DeepSpeed's universal layout and back."""
    from toolkit.checkpoint import universal as layout
    from toolkit.checkpoint.convert import convert as rewrite

    source = _open(path, trust_pickle, plugins)
    if universal:
        layout.write(source, to)
        echo(f"{to}: DeepSpeed's universal layout, {len(source.sharding.by_name)} parameters")
        return
    stage, ranks = stage or source.origin.stage, ranks or source.origin.world_size
    rewrite(source, to, stage=stage, world_size=ranks)
    echo(f"{find(to)}: {ranks} rank(s) at ZeRO stage {stage}")


def export(
    path: Where,
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16, fp16 or fp32 (with what rounding to bf16 left over), for all parameters. (default: as trained)"
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a run with --lora: the whole model, adapters merged into its weights.")
    ] = False,
    trust_pickle: TrustPickle = False,
    plugins: Plugins = None,
) -> None:
    """Write a run's model, or its adapters, in the layout of Hugging Face."""
    from toolkit.checkpoint.export import DTYPES
    from toolkit.checkpoint.export import export as write

    wanted = None if dtype is None else dtype.lower().removeprefix("torch.")
    if wanted is not None and wanted not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}, but must be bf16, fp16 or fp32.{nearest(wanted, DTYPES)}")
    source = _open(path, trust_pickle, plugins)
    files = write(source, to, dtype=wanted, merge=merge)
    kept = f"in {wanted}" if wanted is not None else "as trained"
    echo(f"{to}: step {source.manifest.step} {kept}, {len(files)} file(s)")
