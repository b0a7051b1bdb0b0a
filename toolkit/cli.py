"""The `toolkit` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from toolkit.checkpoint import commands as checkpoints
from toolkit.errors import UserError, nearest

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.add_typer(checkpoints.app, name="checkpoint", help="Inspect, verify and convert checkpoints.")
app.command()(checkpoints.export)


def _print_version(wanted: bool) -> None:
    if wanted:
        from toolkit import __version__

        typer.echo(f"leanstate {__version__}")
        raise typer.Exit


@app.callback()
def toolkit(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Memory-efficient training with DeepSpeed."""


@app.command()
def configs(
    name: Annotated[str | None, typer.Argument(help="Print this configuration's JSON instead of the list.")] = None,
) -> None:
    """List the shipped DeepSpeed configurations and what each is for."""
    from toolkit.config import shipped_configs

    shipped = shipped_configs()
    if name is not None:
        if name not in shipped:
            hint = nearest(name, shipped) or f" Shipped are {', '.join(shipped)}."
            raise UserError(f"there is no shipped config {name!r}.{hint}")
        typer.echo(shipped[name].path.read_text(encoding="utf-8"), nl=False)
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("name", "optimizer", "ZeRO", "offload", "state", "what it is for", box=None)
    table.columns[0].no_wrap = True
    for key, config in shipped.items():
        offload = "+".join(config.offload) or "-"
        table.add_row(key, config.optimizer, str(config.stage), offload, config.state_format, config.purpose)
    Console().print(table)


def main() -> None:
    """Run the command; a UserError ends it with one line on stderr and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
