"""`toolkit train`: DeepSpeed's launcher and launch/train.py in one command, for an installed package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.run.settings import given, taking_settings

_PART = "Ranks and machines (DeepSpeed's launcher)"
_LAUNCHER = (
    *("num_gpus", "num_nodes", "hostfile", "include", "exclude"),
    *("master_addr", "master_port", "no_ssh", "node_rank", "launcher"),
)


@taking_settings
def train(
    ctx: typer.Context,
    num_gpus: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            min=1,
            rich_help_panel=_PART,
            help="Ranks on each machine. (default: one for each GPU, and one without GPUs)",
        ),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option("--hostfile", "-H", rich_help_panel=_PART, help="The machines, one a line: worker-0 slots=8."),
    ] = None,
    num_nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, rich_help_panel=_PART, help="Machines: the first ones of the hostfile."),
    ] = None,
    include: Annotated[
        str | None,
        typer.Option("--include", "-i", rich_help_panel=_PART, help="Only these: worker-0@worker-1:0,2; localhost:1."),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option("--exclude", "-e", rich_help_panel=_PART, help="All but these, in the same form.")
    ] = None,
    no_ssh: Annotated[
        bool,
        typer.Option("--no-ssh", rich_help_panel=_PART, help="Start this machine's ranks only; needs --node-rank."),
    ] = False,
    node_rank: Annotated[
        int | None,
        typer.Option("--node-rank", min=0, rich_help_panel=_PART, help="This machine's place in the hostfile, from 0."),
    ] = None,
    master_addr: Annotated[
        str | None,
        typer.Option("--master-addr", rich_help_panel=_PART, help="The first machine. (default: asked for by ssh)"),
    ] = None,
    master_port: Annotated[
        int | None,
        typer.Option(
            "--master-port",
            min=1,
            max=65535,
            rich_help_panel=_PART,
            help="A free port there. (default: any; with a hostfile 29500)",
        ),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            "--launcher",
            rich_help_panel=_PART,
            help="How other machines are reached: pdsh, mpich or impi. (default: pdsh)",
        ),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(
            "--restarts",
            min=0,
            rich_help_panel=_PART,
            help="Start again from the newest checkpoint, at most so often, when a rank dies or hangs.",
        ),
    ] = 0,
    **values: Any,
) -> None:
    """Train a language model with DeepSpeed, on one rank or many.

    \b
    toolkit train --model qwen3-tiny --steps 20
    toolkit train --ranks 2 --data 'text/*.jsonl' --config soam_zero3
    toolkit train --model folder --from-checkpoint --data chats.jsonl --lora r=16
    toolkit train --hostfile hosts --model qwen3-8b --config amcs_zero3
    """
    from toolkit.config.files import apply_overrides, load_config
    from toolkit.config.validate import check_keys
    from toolkit.data.stream import check_source
    from toolkit.models.presets import check_name
    from toolkit.run import launching, monitors, tracking

    settings = given(ctx, values)
    if not launching.several_machines(hostfile):  # this one need not be among them
        # Said in a second here; ranks have torch and DeepSpeed to import first.
        config = apply_overrides(load_config(settings.config), settings.overrides)
        check_keys(config, origin=settings.config)
        monitors.check_one(settings.tracker, config)
        monitors.check_packages(config)
        check_name(settings.model)
        for data in (settings.data, settings.val_data):
            if data is not None:
                check_source(data)
        tracking.check(settings.tracker)
    given_to_it = {name: ctx.params[name] for name in _LAUNCHER}
    options = {name: value for name, value in given_to_it.items() if value is not None and value is not False}
    raise typer.Exit(launching.train(options, settings, restarts))
