"""`toolkit fits`."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from toolkit.commands.estimate import Adapters, Chat, Gpus
from toolkit.completion import model_names
from toolkit.plugins import Plugins, import_plugins
from toolkit.records.activations import CHECKPOINT, HELP, parse_activations
from toolkit.run.ranks import settle_accelerator
from toolkit.run.settings import check_settings

if TYPE_CHECKING:
    from toolkit.console import PlainConsole
    from toolkit.estimate.fits import Fit

MEMORIES = ("24GB", "48GB", "80GB", "141GB")


def fits(
    gpu_memory: Annotated[
        list[str] | None, typer.Option(help=f"Of one GPU; repeatable. (default: {', '.join(MEMORIES)})")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset, or a folder with a config.json; repeatable. (default: the presets from 0.6B on)",
            autocompletion=model_names,
        ),
    ] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help="One to compare; repeatable. (default: AdamW, AMCS and AdamW8)")
    ] = None,
    plugins: Plugins = None,
    gpus: Gpus = 1,
    state_format: Annotated[
        Literal["fp32", "8bit", "compact", "minimal", "lean", "leanest"],
        typer.Option(help="Of optimizers that have formats."),
    ] = "8bit",
    offload: Annotated[bool, typer.Option("--offload", help="Keep the optimizer's state on the host.")] = False,
    activations: Annotated[str, typer.Option(metavar="WORDS", help=HELP)] = CHECKPOINT,
    adapters: Adapters = None,
    chat: Chat = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the longest sequence that each model can be trained with, by GPU and optimizer (predicted).

    \b
    toolkit fits
    toolkit fits --gpu-memory 24GB --optimizer amcs --optimizer adamw
    toolkit fits --model qwen3-8b --ranks 8 --state-format lean --json
    """
    settle_accelerator()
    from rich.console import Console
    from rich.progress import track

    from toolkit.console import PlainConsole
    from toolkit.estimate.fits import fits as find
    from toolkit.estimate.fits import lengths, ways
    from toolkit.estimate.prices import offered
    from toolkit.estimate.show import PRICED, SPARE, prices
    from toolkit.models.presets import PRESETS
    from toolkit.optim import COMPARED, find_rule
    from toolkit.records.sizes import parse_size

    import_plugins(plugins)
    kept, lora = parse_activations(activations), check_settings(lora=adapters).lora
    memories = [parse_size(text, where="--gpu-memory") for text in gpu_memory or MEMORIES]
    tried = ways(
        optimizer or [one for one in COMPARED if offered(one, state_format)], gpus, state_format, offload=offload
    )
    dense = [preset for preset in PRESETS.values() if preset.family == "qwen3"]
    models = model or [one.name for one in dense if one.activations.checkpoint or "0.6b" in one.name]
    for name in models:
        lengths(name)  # what is no model ends the command before anything is computed
    watched = track(models, "predicting", console=Console(stderr=True), transient=True)
    found = [fit for name in watched for fit in find(name, tried, memories, gpus, kept, lora, chat)]
    if as_json:
        typer.echo(json.dumps([fit.model_dump() for fit in found], indent=1))
        return
    console = PlainConsole()
    where = "one GPU, ZeRO 2" if gpus == 1 else f"{gpus} GPUs, ZeRO 3"
    trained = (f", adapters {lora}" if lora else "") + (", conversations" if chat else "")
    console.print_line(
        f"longest sequence, in tokens, predicted: {where}{', state on the host' if offload else ''}, one sequence a "
        f"pass, activations {kept}, chunked loss{trained}"
    )
    for memory, some in groupby(sorted(found, key=lambda fit: memories.index(fit.gpu_memory)), lambda f: f.gpu_memory):
        _show(console, memory, list(some))
    console.print_line("* the model's own limit; - not even 512 tokens; released: release_gradients")
    console.print_line(f"none of a GPU's memory is left to spare, of which `toolkit plan` keeps {SPARE}")
    rules = {way.optimizer: made.rule for way in tried if (made := find_rule(way.optimizer))}
    said = [f"  {name}: {price}" for name, rule in rules.items() if (price := prices(rule, {state_format}))]
    for line in [f"{PRICED}:", *said] if said else ():
        console.print_line(line)


def _show(console: PlainConsole, memory: int, found: list[Fit]) -> None:
    from rich.table import Table

    from toolkit.records.sizes import size_text

    table = Table(size_text(memory), box=None, pad_edge=False)
    ways = list(dict.fromkeys((fit.optimizer, fit.state) for fit in found))
    for optimizer, state in ways:
        table.add_column(f"{optimizer}\n{state.replace(', ', chr(10))}", justify="right")
    cells = {(fit.model, fit.optimizer, fit.state): _cell(fit) for fit in found}
    for model in dict.fromkeys(fit.model for fit in found):
        table.add_row(model, *(cells[model, *way] for way in ways))
    console.print(table)


def _cell(fit: Fit) -> str:
    return "-" if fit.seq_len is None else f"{fit.seq_len:,}{'*' if fit.whole else ''}"
