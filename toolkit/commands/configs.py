"""`toolkit configs`: what is shipped."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from toolkit.completion import config_names
from toolkit.errors import UserError, nearest
from toolkit.plugins import Plugins, import_plugins

_MARKS = {"": "x", "_lean": "l", "_offload": "o", "_offload_lean": "b"}
"""What a cell of the matrix says, by what a name has behind its stage."""


def configs(
    name: Annotated[
        str | None,
        typer.Argument(help="Print this configuration's JSON instead of the list.", autocompletion=config_names),
    ] = None,
    plugins: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """Show the shipped DeepSpeed configurations: optimizers by ZeRO stage, and what each is for.

    \b
    toolkit configs
    toolkit configs amcs_zero2 > mine.json
    """
    from toolkit.config import names_in_short, shipped_configs

    import_plugins(plugins)
    shipped = shipped_configs()
    if name is not None:
        if name not in shipped:
            hint = nearest(name, shipped) or f" {names_in_short(shipped)}"
            raise UserError(f"there is no shipped config {name!r}.{hint}")
        typer.echo(shipped[name].path.read_text(encoding="utf-8"), nl=False)
        return
    if as_json:
        kept = ("optimizer", "stage", "offload", "state_format", "idea", "placing")
        listed = [{"name": name, **{key: getattr(one, key) for key in kept}} for name, one in shipped.items()]
        typer.echo(json.dumps(listed, indent=1))
        return

    from rich.table import Table

    from toolkit.console import PlainConsole

    stages = sorted({config.stage for config in shipped.values()})
    matrix = Table("optimizer", "state", *map(str, stages), "what it does", box=None, pad_edge=False)
    for kind in sorted({config.optimizer for config in shipped.values()}, key=str.lower):
        usual = shipped[f"{kind.lower()}_zero2"]
        cells = [
            "".join(mark for end, mark in _MARKS.items() if f"{kind.lower()}_zero{stage}{end}" in shipped)
            for stage in stages
        ]
        matrix.add_row(kind.lower(), usual.state_format, *cells, usual.idea)
    ways = Table("way", "what it is for", box=None, pad_edge=False)
    for way, config in sorted({config.way: config for config in shipped.values()}.items()):
        ways.add_row(way, config.placing)
    console = PlainConsole()
    console.print_line("The name of a configuration is <optimizer>_<way>, such as amcs_zero2.")
    console.print_line("By ZeRO stage: x there is one, o with _offload, l with _lean, b with both.\n")
    console.print(matrix, "", ways, sep="\n")
