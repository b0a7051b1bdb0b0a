"""The commands `toolkit checkpoint ...` and `toolkit export`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.checkpoint.wrong import is_checkpoint, not_a_checkpoint
from toolkit.command import App
from toolkit.console import waiting
from toolkit.errors import UserError, nearest
from toolkit.plugins import Plugins, import_plugins
from toolkit.printable import echo

if TYPE_CHECKING:
    from toolkit.checkpoint.source import Source

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


def _open(path: Path, trust_pickle: bool, plugins: Plugins) -> Source:
    from toolkit.checkpoint.universal import open_checkpoint

    import_plugins(plugins)
    with waiting(f"opening {path}"):
        return open_checkpoint(find(path), trust_pickle=trust_pickle)


_PLACE = (("epoch", "epoch"), ("window", "window"), ("document", "index"))
"""Of a position in the data, the word and the field."""


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
        **({"beside": source.base.path} if source.based and source.base is not None else {}),
        "bytes": f"{manifest.bytes:,} ({manifest.bytes / max(manifest.parameters, 1):.2f} per parameter)",
        **{part: entry["name"] for part, entry in facts.get("identity", {}).items()},
        "data continue at": ", ".join(f"{word} {at.get(key, 0)}" for word, key in _PLACE) if at else "?",
        "versions": ", ".join(f"{key} {value}" for key, value in facts.get("versions", {}).items()) or "?",
    }
    if digest:
        with waiting("hashing the state"):
            rows["digest"] = source.digest()
    sizes = {name: int(entry["bytes"]) for name, entry in manifest.files.items()}
    if as_json:
        typer.echo(json.dumps({**rows, "files": sizes}, default=str, indent=1))
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    listed = {name: f"{size:,}" for name, size in _listed(sizes).items()}
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


def _formats(flats: Any) -> set[str]:
    found = set()
    for flat in flats:
        states = " ".join(f"{name}={value}" for name, value in flat.formats.items())
        found.add(f"{states} weights={flat.weights if flat.dtype == 'bfloat16' else flat.dtype}")
    return found


@app.command()
def verify(path: Where, plugins: Plugins = None, as_json: Json = False) -> None:
    """Compare every file with the manifest and its hash, of one checkpoint or of all of a run.

    \b
    toolkit checkpoint verify runs/first
    """
    from toolkit.checkpoint.store import Store

    import_plugins(plugins)
    stores = [Store(folder) for folder in (path / "checkpoints", path) if Store(folder).steps()]
    folders = [stores[0].path(step) for step in stores[0].steps()] if stores else [find(path)]
    found: dict[str, list[str]] = {}
    for folder in folders:
        with waiting(f"reading {folder.name}"):
            found[folder.name] = _problems(folder)
        if not as_json:
            echo(f"{folder.name}: {'; '.join(found[folder.name]) or 'intact'}")
    if as_json:
        typer.echo(json.dumps({"folder": str(folders[0].parent), "problems": found}, indent=1))
    damaged = sum(map(bool, found.values()))
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

    source = _open(path, trust_pickle, plugins)
    if universal:
        with waiting(f"writing {to}"):
            layout.write(source, to)
        said = f"{to}: DeepSpeed's universal layout, {len(source.sharding.by_name)} parameters"
        _say(said, as_json, folder=to, universal=True, parameters=len(source.sharding.by_name))
        return
    stage, ranks = stage or source.origin.stage, ranks or source.origin.world_size
    with waiting(f"writing {to}"):
        rewrite(source, to, stage=stage, world_size=ranks)
    said = f"{find(to)}: {ranks} rank(s) at ZeRO stage {stage}"
    _say(said, as_json, folder=find(to), universal=False, ranks=ranks, stage=stage)


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
    source = _open(path, trust_pickle, plugins)
    moved(source, model)
    pushed = Push.checked(push, to, public=public) if push is not None else None
    step = source.manifest.step
    with waiting(f"writing {to}"):
        files = write(source, to, dtype=wanted, merge=merge)
    said = f"{to}: step {step} {f'in {wanted}' if wanted is not None else 'as trained'}, {len(files)} file(s)"
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
