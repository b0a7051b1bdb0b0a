"""`toolkit estimate` and `toolkit plan`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from toolkit.completion import config_names, model_names
from toolkit.config.files import load_config
from toolkit.errors import UserError, nearest
from toolkit.models.presets import check_name
from toolkit.plugins import Plugins, import_plugins
from toolkit.records.activations import FLAG, HELP, parse_activations
from toolkit.records.sizes import parse_size, size_text
from toolkit.run.ranks import settle_accelerator
from toolkit.run.settings import RunSettings, check_settings
from toolkit.usage import to_type

Device = Literal["cuda", "cpu"]
Model = Annotated[
    str,
    typer.Option(
        help="A preset, a folder with a Hugging Face model's config.json, or its hub name.", autocompletion=model_names
    ),
]
Config = Annotated[
    str,
    typer.Option(
        "--config",
        metavar="NAME|FILE",
        autocompletion=config_names,
        help="A shipped configuration's name or the path of a DeepSpeed JSON.",
    ),
]
# No machine or cluster has more; with them, bytes of the whole are numbers that other code can count.
Gpus = Annotated[int, typer.Option("--ranks", min=1, max=1024, help="Ranks on each machine.")]
Nodes = Annotated[int, typer.Option(min=1, max=100_000, help="Machines.")]
# One run is estimated, planned and trained: what all three have begins with the same value.
_SEQ_LEN: int = RunSettings.model_fields["seq_len"].default
SeqLen = Annotated[int, typer.Option(min=1, help="Predictions per sequence.")]
On = Annotated[Device, typer.Option("--device", help="Whose kernels and allocator: on a cpu, host and device are one.")]
Loss = Annotated[
    Literal["chunked", "plain"] | None,
    typer.Option(help="chunked never builds the full logits. (default: the preset's)"),
]

Adapters = Annotated[
    str | None,
    typer.Option("--lora", metavar="r=16,...", help="Only adapters are trained: as for `toolkit train`."),
]
Chat = Annotated[bool, typer.Option("--chat", help="Trained on conversations: attention has a mask.")]


def estimate(
    model: Model = "qwen3-tiny",
    name: Config = "amcs_zero2",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overwrite one key of the JSON; repeatable."),
    ] = None,
    plugins: Plugins = None,
    gpus: Gpus = 1,
    nodes: Nodes = 1,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences per rank and forward pass. (default: the JSON's)")
    ] = None,
    grad_accum: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches per optimizer step. (default: the JSON's)")
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences per optimizer step, all ranks. (default: the JSON's)")
    ] = None,
    seq_len: SeqLen = _SEQ_LEN,
    activations: Annotated[str | None, typer.Option(metavar="WORDS", help=f"{HELP} (default: the preset's)")] = None,
    loss: Loss = None,
    attention: Annotated[
        Literal["flash", "eager"] | None, typer.Option(help="The attention kernel. (default: the model's own choice)")
    ] = None,
    adapters: Adapters = None,
    chat: Chat = False,
    device: On = "cuda",
    gpu_memory: Annotated[
        str | None, typer.Option(help="Of one GPU, such as 80GB; exit status 1 if the run does not fit.")
    ] = None,
    what_if: Annotated[bool, typer.Option("--what-if", help="Also what other settings would hold.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole prediction as JSON.")] = False,
) -> None:
    """Predict the memory of a training run, per rank, before it runs.

    \b
    toolkit estimate --model qwen3-8b --micro-batch 1 --gpu-memory 80GB
    toolkit estimate --config soam_zero3 --ranks 8 --nodes 2 --what-if
    toolkit estimate --config mine.json --set zero_optimization.stage=3 --json
    """
    from toolkit.console import PlainConsole, waiting

    memory = None if gpu_memory is None else parse_size(gpu_memory, where="--gpu-memory")
    load_config(name)  # said before what takes seconds to import
    check_name(model)
    with waiting("predicting"):
        settle_accelerator()
        from toolkit import config as configs
        from toolkit import models
        from toolkit.config.batch import ACCUMULATION, GLOBAL, MICRO, resolve_batch
        from toolkit.estimate.predict import Case, Estimator, variants

        import_plugins(plugins)
        config = configs.apply_overrides(configs.load_config(name), overrides or [])
        configs.validate(config, origin=name)
        models.check_length(models.load_config(model)[0], model, seq_len)
        world_size = gpus * nodes
        batch = resolve_batch({MICRO: micro_batch, ACCUMULATION: grad_accum, GLOBAL: global_batch}, config, world_size)
        case = Case(
            model,
            config,
            world_size,
            batch.micro,
            seq_len,
            accumulation=batch.accumulation,
            device=device,
            activations=parse_activations(activations),
            loss=loss,
            attention={"flash": "sdpa", "eager": "eager", None: None}[attention],
            lora=check_settings(lora=adapters).lora,
            conversations=chat,
        )
        estimator = Estimator()
        found = estimator.predict(case)
        if what_if:
            found.changes = estimator.changes(case, found.peak)
        blocks = variants(case) if what_if and not as_json else found.per_block
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        from toolkit.estimate.show import show_prediction

        unit = "GPU" if device == "cuda" else "rank"
        ranks = f"{gpus} {unit}{'s' if gpus > 1 else ''}" if nodes == 1 else f"{nodes} x {gpus} {unit}s"
        show_prediction(PlainConsole(), found, blocks, memory, ranks)
    if memory is not None and found.needed > memory:
        raise typer.Exit(1)


def plan(
    model: Model,
    gpu_memory: Annotated[str, typer.Option(help="Of one GPU, such as 80GB.")],
    gpus: Gpus = 1,
    nodes: Nodes = 1,
    seq_len: SeqLen = _SEQ_LEN,
    optimizer: Annotated[
        str | None,
        typer.Option(help="Of a shipped configuration, or a rule of --plugin. (default: AMCS)"),
    ] = None,
    plugins: Plugins = None,
    state_format: Annotated[
        Literal["fp32", "8bit", "compact", "minimal", "lean", "leanest", "any"] | None,
        typer.Option(
            help="The state format to recommend; smaller than 8bit only where its price in loss is measured. For rules "
            "only. (default: 8bit, or fp32 where 8bit is measured to raise the loss)"
        ),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Of one machine, such as 512GB, for what is offloaded. (default: this machine's)")
    ] = None,
    loss: Loss = None,
    adapters: Adapters = None,
    chat: Chat = False,
    device: On = "cuda",
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the DeepSpeed JSON. (default: <model>-plan.json, or -plan-2.json and so on)"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the recommended DeepSpeed JSON and nothing else.")
    ] = False,
) -> None:
    """Find the fastest shipped configuration, state format and micro-batch that fits, and write its JSON.

    \b
    toolkit plan --model qwen3-8b --gpu-memory 80GB
    toolkit plan --model qwen3-8b --gpu-memory 24GB --ranks 8 --state-format any
    toolkit plan --model folder --gpu-memory 40GB --json > mine.json
    """
    from toolkit.console import PlainConsole, waiting

    memory = parse_size(gpu_memory, where="--gpu-memory")
    check_name(model)
    if not as_json and out is not None and out.exists():
        raise UserError(f"{out} is there already; name another file with --out.")
    with waiting("looking for what fits") as say:
        settle_accelerator()
        from toolkit import models
        from toolkit.config import shipped_configs
        from toolkit.estimate.prices import default_format
        from toolkit.estimate.recommend import NVME_PATH, recommend
        from toolkit.optim import RECOMMENDED, RULES

        import_plugins(plugins)
        asked_for, optimizer = optimizer, optimizer or RECOMMENDED
        known = sorted({*RULES, *(shipped.optimizer for shipped in shipped_configs().values())})
        chosen = next((name for name in known if name.lower() == optimizer.lower()), None)
        if chosen is None:
            raise UserError(f"--optimizer is {optimizer!r}, but must be {', '.join(known)}.{nearest(optimizer, known)}")
        host = _host_memory() if host_memory is None else parse_size(host_memory, where="--host-memory")
        models.check_length(models.load_config(model)[0], model, seq_len)
        lora = check_settings(lora=adapters).lora
        found = recommend(
            model,
            gpu_memory=memory,
            world_size=gpus * nodes,
            seq_len=seq_len,
            optimizer=chosen,
            device=device,
            loss=loss,
            lora=lora,
            conversations=chat,
            state_format=state_format,
            host_memory=host,
            ranks_per_machine=gpus,
            say=lambda words: say(f"looking for what fits, {words}"),
        )
    console = PlainConsole()
    best = found[0]

    def on_disk(where: object, size: int) -> str:
        return (
            f"the state lies on a disk: nvme_path in {where} is {NVME_PATH}; make it a folder on a local disk with "
            f"{size_text(size)} of room."
        )

    if not as_json:
        from toolkit.estimate.show import show_candidates

        whose = "of this machine (another's: --host-memory)" if host_memory is None else "of --host-memory"
        show_candidates(console, found, memory, seq_len, chosen, f"the {size_text(host)} {whose}")
    if not (best.fits and best.asked):
        if as_json:
            state = state_format or default_format(chosen)
            typer.echo(f"nothing fits with {state} state and room to spare; without --json it is said why.", err=True)
        raise typer.Exit(1)
    if as_json:
        typer.echo(json.dumps(best.json, indent=2))
        if best.disk:
            typer.echo(on_disk("the JSON", best.disk), err=True)
        return
    path = out or _unused(Path(f"{Path(model).name}-plan.json"))
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(best.json, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    kept = f"{FLAG} {best.activations}" + (f" --loss {loss}" if loss else "") + (f" --lora {lora}" if lora else "")
    where = f"--ranks {gpus}" + (f" --hostfile hosts --nodes {nodes}" if nodes > 1 else "")
    own = "".join(f" --plugin {plugin}" for plugin in plugins or ())
    following = f"toolkit train {where} --model {model} --config {path}{own} --seq-len {seq_len} {kept}"
    if asked_for is None:
        console.print_line(f"the optimizer is {chosen}, the default; --optimizer adamw8, muon8, ... plans for another.")
    console.print_line(
        "a training also takes --data, --from-checkpoint, --global-batch and --steps: add what you need."
    )
    if best.disk:
        console.print_line(on_disk(path, best.disk))
    console.print_line(f"{path} written; train with: {to_type(following)}")


def _unused(path: Path) -> Path:
    """`path`, with a number where there is such a file already: plans are edited, so none is written over."""
    found, number = path, 1
    while os.path.lexists(found):
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def _host_memory() -> int:
    """Bytes that this machine, or the control group that this process is in, has."""
    import torch

    from toolkit.memory.watermarks import limits

    return min(limits(torch.device("cpu")).values())
