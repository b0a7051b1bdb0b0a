"""The commands `toolkit checkpoint ...` and `toolkit export`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from toolkit.checkpoint.wrong import is_checkpoint, not_a_checkpoint
from toolkit.command import App
from toolkit.console import waiting
from toolkit.errors import UserError, nearest
from toolkit.plugins import Plugins, import_plugins
from toolkit.printable import echo
from toolkit.records.sizes import counted

if TYPE_CHECKING:
    from toolkit.checkpoint.source import Source
    from toolkit.state.sharding import Sharding

app = App()
Where = Annotated[Path, typer.Argument(metavar="RUN", help="A run (its newest checkpoint is taken) or a checkpoint.")]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Read objects of any class from a checkpoint without manifest: this runs whatever code its files name.",
    ),
]
BaseFolder = Annotated[
    Path | None,
    typer.Option("--model", metavar="FOLDER", help="Of a run with --lora: where the model that it began from is now."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_TRIES = 10
"""Of reading the newest checkpoint of a run that goes on, and removes it meanwhile."""
_Found = TypeVar("_Found")
_SHOWN = 5
"""Files that are not of a checkpoint, at most."""
_LISTED = 20
"""Files of a folder that are shown one by one, at most. (DeepSpeed's universal layout has some for each parameter.)"""


def find(path: Path, step: int | None = None) -> Path:
    """The folder of the checkpoint that `path` means: itself, or of a run that of `step`, the newest for None.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        raise UserError(not_a_checkpoint(path))
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
    if not is_checkpoint(path):
        raise UserError(not_a_checkpoint(path))
    if step is not None:
        raise UserError(f"{path} is one checkpoint: --checkpoint is for a run, which has several.")
    return path


def reading(path: Path, use: Callable[[Path], _Found], step: int | None = None) -> _Found:
    """What `use` makes of the folder that `find` gives: whatever reads the checkpoint of a run goes through here.

    A run that goes on removes old checkpoints. Where its newest one is removed while it is read, `use` is called again
    with the one that is the newest by then.

    Raises:
        UserError: as `find`; the checkpoint that was named is removed while it is read.
    """
    for _ in range(_TRIES):
        folder = find(path, step)
        try:
            return use(folder)
        except Exception:  # whatever a reader says of files that are gone
            if folder.is_dir():
                raise
            if step is not None or folder == path:
                raise _removed(folder) from None
    raise _removed_too_often(path)


def _removed(folder: Path) -> UserError:
    return UserError(f"{folder} was removed while it was read.")


def _removed_too_often(path: Path) -> UserError:
    return UserError(
        f"the newest checkpoint of {path} was removed {_TRIES} times while it was read: the run there goes on, and its "
        "--keep-last is too small for that."
    )


def _with_source(path: Path, trust_pickle: bool, plugins: Plugins, use: Callable[[Source], _Found]) -> _Found:
    """The same of the checkpoint, opened."""
    from toolkit.checkpoint import universal

    import_plugins(plugins)

    def opened(folder: Path) -> Source:
        with waiting(f"opening {path}"):
            return universal.open_checkpoint(folder, trust_pickle=trust_pickle)

    return reading(path, lambda folder: use(opened(folder)))


@app.callback()
def checkpoint() -> None:
    """Inspect, verify and convert checkpoints.

    \b
    toolkit checkpoint inspect runs/first
    toolkit checkpoint convert runs/first --out two --ranks 2
    """


@app.command()
def inspect(
    path: Where,
    digest: Annotated[bool, typer.Option("--digest", help="Hash the state, however it is cut.")] = False,
    trust_pickle: TrustPickle = False,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds, and how large it is.

    \b
    toolkit checkpoint inspect runs/first
    toolkit checkpoint inspect runs/first/checkpoints/global_step100 --digest
    """
    from rich.table import Table

    from toolkit.checkpoint.described import describe, rows
    from toolkit.console import PlainConsole

    found = _with_source(path, trust_pickle, plugins, lambda source: describe(source, digest=digest))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(found).items():
        table.add_row(name, value)
    listed = {name: f"{size:,}" for name, size in _listed(found["files"]).items()}
    widest = max(map(len, listed.values()), default=0)
    for place, (name, size) in enumerate(listed.items()):
        table.add_row("" if place else "files", f"{size:>{widest}}  {name}")
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


@app.command()
def verify(path: Where, plugins: Plugins = None, as_json: Json = False) -> None:
    """Compare every file with the manifest and its hash, of one checkpoint or of all of a run.

    \b
    toolkit checkpoint verify runs/first
    """
    import_plugins(plugins)
    found: dict[str, list[str]] = {}
    for _ in range(_TRIES):
        folders = _all_in(path)
        for folder in folders:
            with waiting(f"reading {folder.name}"):
                problems = _problems(folder)
            if not folder.is_dir():  # a run that goes on removes old ones, which is no damage
                if folder == path:
                    raise _removed(folder)
                if not as_json:
                    echo(f"{folder.name}: removed while it was read")
                continue
            found[folder.name] = problems
            if not as_json:
                echo(f"{folder.name}: {'; '.join(problems) or 'intact'}")
        if found:
            break
    else:
        raise _removed_too_often(path)
    if as_json:
        typer.echo(json.dumps({"folder": str(folders[0].parent), "problems": found}, indent=1))
    damaged = sum(map(bool, found.values()))
    if damaged:
        raise UserError(f"{damaged} of {counted(len(found), 'checkpoint')} {'is' if damaged == 1 else 'are'} damaged.")


def _all_in(path: Path) -> list[Path]:
    """Of a run or a folder of checkpoints all, newest first; else what `find` gives."""
    from toolkit.checkpoint.store import Store

    stores = [Store(folder) for folder in (path / "checkpoints", path) if Store(folder).steps()]
    return [stores[0].path(step) for step in stores[0].steps()] if stores else [find(path)]


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
    to: Annotated[Path, typer.Option("--out", help="The folder to write: checkpoints go into it as global_step<n>.")],
    ranks: Annotated[int | None, typer.Option(min=1, help="Number of ranks. (default: as it was)")] = None,
    stage: Annotated[
        int | None, typer.Option("--zero-stage", min=1, max=3, help="ZeRO stage. (default: as it was)")
    ] = None,
    universal: Annotated[bool, typer.Option("--universal", help="Write DeepSpeed's universal layout.")] = False,
    trust_pickle: TrustPickle = False,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Rewrite a checkpoint for another number of ranks or stage, or into DeepSpeed's universal layout and back.

    \b
    toolkit checkpoint convert runs/first --out eight --ranks 8 --zero-stage 3
    toolkit checkpoint convert runs/first --out universal --universal
    """
    from toolkit.checkpoint import universal as layout
    from toolkit.checkpoint.convert import convert as rewrite

    def write(source: Source) -> Sharding:
        with waiting(f"writing {to}"):
            if universal:
                layout.write(source, to)
                return source.sharding
            made = (stage or source.origin.stage, ranks or source.origin.world_size)
            return rewrite(source, to, stage=made[0], world_size=made[1])

    made = _with_source(path, trust_pickle, plugins, write)
    if universal:
        said = f"{to}: DeepSpeed's universal layout, {counted(len(made.by_name), 'parameter')}"
        _say(said, as_json, folder=to, universal=True, parameters=len(made.by_name))
        return
    said = f"{find(to)}: {counted(made.world_size, 'rank')} at ZeRO stage {made.stage}"
    _say(said, as_json, folder=find(to), universal=False, ranks=made.world_size, stage=made.stage)


def export(
    path: Where,
    to: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Of all parameters; fp32 keeps what rounding to bf16 left over. (default: as trained)"),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a run with --lora: the whole model, adapters merged into its weights.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Upload the folder to this repository of the Hugging Face hub, a private one.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: the repository is for everybody to see.")
    ] = False,
    model: BaseFolder = None,
    trust_pickle: TrustPickle = False,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Write a run's model, or its adapters, in the layout of Hugging Face.

    \b
    toolkit export runs/first --out exported
    toolkit export runs/first --out exported --dtype fp32
    toolkit export runs/first --out exported --push owner/name
    """
    from toolkit.checkpoint.export import DTYPES, moved
    from toolkit.checkpoint.export import export as write
    from toolkit.checkpoint.hub import Push

    wanted = None if dtype is None else dtype.lower().removeprefix("torch.")
    if wanted is not None and wanted not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}, but must be bf16, fp16 or fp32.{nearest(wanted, DTYPES)}")
    if public and push is None:
        raise UserError("--public is for --push.")

    def written(source: Source) -> tuple[Push | None, int, list[Path]]:
        moved(source, model)
        pushed = Push.checked(push, to, public=public) if push is not None else None
        with waiting(f"writing {to}"):
            return pushed, source.manifest.step, write(source, to, dtype=wanted, merge=merge)

    pushed, step, files = _with_source(path, trust_pickle, plugins, written)
    said = f"{to}: step {step} {f'in {wanted}' if wanted is not None else 'as trained'}, {counted(len(files), 'file')}"
    facts: dict[str, Any] = {"folder": to, "step": step, "dtype": wanted, "files": [str(file) for file in files]}
    if pushed is not None:
        with waiting(f"uploading to {push}"):
            facts["url"] = pushed.upload(to, f"Step {step}")
        said += f"; uploaded to {facts['url']}"
    _say(said, as_json, **facts)


def _say(words: str, as_json: bool, **facts: Any) -> None:
    """What was done: a line, or a JSON."""
    if as_json:
        typer.echo(json.dumps(facts, default=str, indent=1))
    else:
        echo(words)
