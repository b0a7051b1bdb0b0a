"""The commands `toolkit checkpoint ...` and `toolkit export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.checkpoint.wrong import is_checkpoint, not_a_checkpoint
from toolkit.errors import UserError, nearest

if TYPE_CHECKING:
    from toolkit.checkpoint.source import Source

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
DTYPE_NAMES = {"bf16": "bf16", "bfloat16": "bf16"} | dict.fromkeys(("fp32", "float32", "float", "f32"), "fp32")
"""What people call the dtypes of an export."""
Where = Annotated[Path, typer.Argument(help="A run, its newest checkpoint then, or a checkpoint.")]


def find(path: Path) -> Path:
    """The folder of the checkpoint that `path` means: itself, or the newest one of a run. Raises UserError."""
    from toolkit.checkpoint.store import LATEST, Store

    for folder in (path / "checkpoints", path):
        steps = Store(folder).steps()
        if steps:
            return Store(folder).path(steps[0])
        if (folder / LATEST).is_file():
            named = folder / (folder / LATEST).read_text().strip()
            if not is_checkpoint(named):
                raise UserError(f"{folder / LATEST} names {named.name!r}, which is no checkpoint in {folder}.")
            return named
    if not path.is_dir() or not is_checkpoint(path):
        raise UserError(not_a_checkpoint(path))
    return path


def _open(path: Path) -> Source:
    from toolkit.checkpoint.universal import open_checkpoint

    return open_checkpoint(find(path))


@app.command()
def inspect(
    path: Where,
    digest: Annotated[bool, typer.Option("--digest", help="Hash the state, however it is cut.")] = False,
) -> None:
    """Show what a checkpoint holds, and how large it is."""
    from rich.console import Console
    from rich.table import Table

    source = _open(path)
    manifest, sharding = source.manifest, source.origin
    facts: dict[str, Any] = manifest.facts
    rows = {
        "folder": source.folder,
        "step": manifest.step,
        "saved": facts.get("saved", "?"),
        "ranks": f"{sharding.world_size} at ZeRO stage {sharding.stage}",
        "optimizer": f"{sharding.rule or 'Adam'}: {', '.join(state.name for state in sharding.states)}",
        "kept as": "; ".join(sorted(_formats(sharding.flats))),
        "parameters": f"{manifest.parameters:,}",
        "bytes": f"{manifest.bytes:,} ({manifest.bytes / max(manifest.parameters, 1):.2f} per parameter)",
        **{part: entry["name"] for part, entry in facts.get("identity", {}).items()},
        "data go on at": ", ".join(f"{key} {value}" for key, value in facts.get("position", {}).items()) or "?",
        "versions": ", ".join(f"{key} {value}" for key, value in facts.get("versions", {}).items()) or "?",
    }
    if digest:
        rows["digest"] = source.digest()
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    for name, entry in sorted(manifest.files.items()):
        table.add_row("", f"{entry['bytes']:>15,}  {name}")
    Console(highlight=False).print(table)


def _formats(flats: Any) -> set[str]:
    found = set()
    for flat in flats:
        states = " ".join(f"{name}={value}" for name, value in flat.formats.items())
        found.add(f"{states} weights={flat.weights if flat.dtype == 'bfloat16' else flat.dtype}")
    return found


@app.command()
def verify(path: Where) -> None:
    """Compare every file with its hash, of one checkpoint or of all of a run."""
    from toolkit.checkpoint import manifest as manifests
    from toolkit.checkpoint.store import Store

    stores = [Store(folder) for folder in (path / "checkpoints", path) if Store(folder).steps()]
    folders = [stores[0].path(step) for step in stores[0].steps()] if stores else [find(path)]
    problems = []
    for folder in folders:
        try:
            problem = manifests.damage(folder, manifests.read(folder))
        except UserError as error:
            problem = str(error)
        typer.echo(f"{folder.name}: {problem or 'intact'}")
        problems += [problem] if problem else []
    if problems:
        raise UserError(f"{len(problems)} of {len(folders)} checkpoints are damaged.")


@app.command()
def convert(
    path: Where,
    to: Annotated[Path, typer.Option(help="The folder to write: checkpoints go into it as global_step<n>.")],
    ranks: Annotated[int | None, typer.Option(min=1, help="Number of ranks. (default: as it was)")] = None,
    stage: Annotated[int | None, typer.Option(min=1, max=3, help="ZeRO stage. (default: as it was)")] = None,
    universal: Annotated[bool, typer.Option("--universal", help="Write DeepSpeed's universal layout.")] = False,
) -> None:
    """Rewrite a checkpoint for another number of ranks or stage, or into DeepSpeed's universal layout and back."""
    from toolkit.checkpoint import universal as layout
    from toolkit.checkpoint.convert import convert as rewrite

    source = _open(path)
    if universal:
        layout.write(source, to)
        typer.echo(f"{to}: DeepSpeed's universal layout, {len(source.sharding.by_name)} parameters")
        return
    stage, ranks = stage or source.origin.stage, ranks or source.origin.world_size
    moved = rewrite(source, to, stage=stage, world_size=ranks)
    typer.echo(f"{find(to)}: {ranks} rank(s) at ZeRO stage {stage}")
    if moved:
        typer.echo(
            f"note: state of {len(moved)} parameters was decoded and encoded on other blocks, {moved[0]} for one."
        )


def export(
    path: Where,
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    dtype: Annotated[str, typer.Option(help="bf16, or fp32: weights with what rounding to bf16 left over.")] = "bf16",
) -> None:
    """Write a run's weights as a Hugging Face model."""
    from toolkit.checkpoint.export import DTYPES
    from toolkit.checkpoint.export import export as write

    wanted = DTYPE_NAMES.get(dtype.lower().removeprefix("torch."))
    if wanted not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}, but must be {' or '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    source = _open(path)
    files = write(source, to, dtype=wanted)
    typer.echo(f"{to}: step {source.manifest.step} in {wanted}, {len(files)} file(s)")
