"""`toolkit bench`: how fast this machine is, and what became slower."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from toolkit.bench.against import TOLERANCE
from toolkit.command import App
from toolkit.commands.bench_call import OPTIONS, Call, listed, of_a_rank, say
from toolkit.completion import model_names
from toolkit.errors import UserError, nearest
from toolkit.plugins import Plugins, import_plugins

app = App()
Json = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write all figures as JSON; - is stdout.")]
Against = Annotated[
    Path | None,
    typer.Option(help="JSON of an earlier call: say what is slower; exit status 1 where anything is."),
]
Anyway = Annotated[
    bool, typer.Option("--anyway", help="Compare with a file of another machine or other settings, too.")
]
Tolerance = Annotated[float, typer.Option(min=0.0, help="What a median may be above the earlier one, as a fraction.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of the CPU for each rank. (default: the cores, shared out)")
]
Model = Annotated[
    str, typer.Option(help="A preset, a folder with a Hugging Face model, or its hub name.", autocompletion=model_names)
]
SeqLen = Annotated[int, typer.Option(min=1, help="Predictions per sequence.")]
MicroBatch = Annotated[int, typer.Option(min=1, help="Sequences per rank and forward pass.")]
Ranks = Annotated[int, typer.Option(min=1, help="Ranks of each run, started by DeepSpeed's launcher.")]
Stage = Annotated[int, typer.Option(min=1, max=3, help="ZeRO stage of methods that do not name theirs.")]
Repeats = Annotated[int, typer.Option(min=7, help="Rounds that are timed; in each everything is measured once.")]
_PARAMETERS, _LARGEST = "33.5M", "1B"
_GROWING = ("torch-adamw:fp32", "deepspeed-cpu-adam:fp32", "amcs:8bit:fp32", "amcs:8bit:bf16+8")


@app.callback(invoke_without_command=True)
def bench(
    ctx: typer.Context,
    against: Annotated[
        Path | None,
        typer.Option(help="JSON of an earlier call: measure the same again; exit status 1 where anything is slower."),
    ] = None,
    anyway: Anyway = False,
    tolerance: Tolerance = TOLERANCE,
    json_to: Json = None,
    plugins: Plugins = None,
) -> None:
    """Measure how fast this machine is, and what became slower.

    \b
    toolkit bench step --model qwen3-134m --json before.json
    toolkit bench --against before.json
    """
    if ctx.invoked_subcommand is not None:
        if against is not None or json_to is not None or plugins:
            raise UserError(f"options of `toolkit bench {ctx.invoked_subcommand}` go behind it.")
        return
    if against is None:
        raise UserError(f"give what to measure ({', '.join(OPTIONS)}), or --against FILE.")
    from toolkit.bench.record import read

    before = read(against)
    known = OPTIONS[before.command]
    unknown = next((key for key in before.options if key not in known), None)
    if unknown is not None:
        raise UserError(f"{against} has an option {unknown!r}, which `toolkit bench {before.command}` does not have.")
    import_plugins(plugins)
    arguments = ["--against", str(against), "--tolerance", str(tolerance), *(["--anyway"] if anyway else [])]
    arguments += ["--json", json_to] if json_to is not None else []
    for key, value in before.options.items():
        flag = f"--{key.replace('_', '-')}"
        arguments += [flag] if value is True else [flag, str(value)] if value not in (None, False) else []
    command: Any = typer.main.get_command(app)
    raise typer.Exit(command.main([before.command, *arguments], standalone_mode=False) or 0)


@app.command()
def step(
    ctx: typer.Context,
    optimizers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:FORMAT:WEIGHTS,...",
            help="Rules of this package with state format and weights (fp32, master, bf16+16, bf16+8, bf16+4, "
            "bf16), and others: torch-adamw, deepspeed-cpu-adam, bnb-adamw8bit, bnb-ademamix8bit (fp32, bf16, master), "
            "flash-adamw. (default: a dozen)",
        ),
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help=f"Of one large tensor. (default: {_PARAMETERS}; with --growth {_LARGEST})")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The tensors of a model instead, by preset or folder.")] = None,
    baseline: Annotated[str | None, typer.Option(help="What ratios are to. (default: the first that runs)")] = None,
    repeats: Repeats = 11,
    threads: Threads = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Where the step runs. (default: a GPU, where there is one)")
    ] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="From 1M parameters up to --parameters, and from 10 to 10,240 tensors.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="With --growth: draw it (.png, .svg, .pdf).")] = None,
    json_to: Json = None,
    against: Against = None,
    anyway: Anyway = False,
    tolerance: Tolerance = TOLERANCE,
    plugins: Plugins = None,
) -> None:
    """Time the optimizer's step: ours and others', in turn, on the same tensors, beside a copy.

    \b
    toolkit bench step
    toolkit bench step --optimizers torch-adamw,amcs:compact:bf16+4 --threads 1
    toolkit bench step --model qwen3-134m --json before.json
    toolkit bench step --model qwen3-134m --against before.json
    toolkit bench step --growth --plot growth.png
    """
    if growth and model is not None:
        raise UserError("--growth has sizes of its own: leave --model out.")
    if model is not None and parameters is not None:
        raise UserError("--parameters and --model both say which tensors; give one of them.")
    if plot is not None and not growth:
        raise UserError("--plot draws growth: give --growth, too.")
    call = Call(ctx, threads, device, plugins, json_to, against, anyway, tolerance)
    if plot is not None:
        from toolkit.bench.show import check_plot

        check_plot(plot)
    from toolkit.bench import shapes, step
    from toolkit.bench.contenders import DEFAULT, read_contenders

    given = optimizers or ",".join(_GROWING if growth else DEFAULT)
    contenders = read_contenders(listed(given))
    base = None if baseline is None else read_contenders([baseline])[0].name
    if growth:
        largest = shapes.parse_count(parameters or _LARGEST, where="--parameters")
        call.begin({"growth": True, "parameters": largest})
        found = step.growth(contenders, largest, call.device, repeats, base, say=say, keep=call.keep)
    else:
        if model is not None:
            chosen = shapes.of_model(model)
        else:
            chosen = shapes.even(shapes.parse_count(parameters or _PARAMETERS, where="--parameters"))
        call.begin({"model": model, "parameters": chosen.parameters, "tensors": chosen.tensors})
        found = step.measure(contenders, chosen, call.device, repeats, base, say=say)
    record = call.record(found)
    if plot is not None:
        from toolkit.bench.show import plot as draw

        draw(record, plot)
    call.finish(record, base or next(row.name for row in record.rows if row.name != step.COPY))


@app.command()
def train(
    ctx: typer.Context,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME=CONFIG,...",
            help="As for `toolkit compare`: shipped configs, rules, classes by import path, NAME=a config; and "
            "hf-trainer, the Hugging Face Trainer with DeepSpeed's AdamW.",
        ),
    ] = "hf-trainer,adamw,amcs",
    baseline: Annotated[str | None, typer.Option(help="What ratios are to. (default: the first)")] = None,
    model: Model = "qwen3-tiny",
    data: Annotated[str, typer.Option(help="As for `toolkit train`; the Trainer gets random tokens.")] = "stdlib",
    seq_len: SeqLen = 256,
    micro_batch: MicroBatch = 2,
    grad_accum: Annotated[int, typer.Option(min=1, help="Micro-batches per optimizer step.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run that are timed, after three that are not.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each method, in turn; below 7 is said.")] = 3,
    compile_model: Annotated[
        bool, typer.Option("--compile-model", help="Each method but the Trainer once more, with its model compiled.")
    ] = False,
    ranks: Ranks = 1,
    zero_stage: Stage = 2,
    threads: Threads = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="TFLOP/s of each rank's device, for the MFU. (default: known for some GPUs)"),
    ] = None,
    json_to: Json = None,
    against: Against = None,
    anyway: Anyway = False,
    tolerance: Tolerance = TOLERANCE,
    plugins: Plugins = None,
) -> None:
    """Time whole training steps: methods and the Hugging Face Trainer, processes in turn.

    \b
    toolkit bench train
    toolkit bench train --ranks 2 --methods hf-trainer,adamw,amcs,soam
    """
    call = Call(ctx, of_a_rank(threads, ranks), None, plugins, json_to, against, anyway, tolerance)
    import tempfile

    from toolkit.bench import train
    from toolkit.bench.methods import read_each
    from toolkit.bench.record import LEAST

    each = read_each(listed(methods), train.TRAINER, zero_stage)
    trainer = each.get(train.TRAINER)
    own = [method for name, method in each.items() if name != train.TRAINER]
    order = list(each)
    if steps * rounds < LEAST:
        raise UserError(f"--steps {steps} in --rounds {rounds} are too few: a median is of {LEAST} steps at least.")
    base = baseline or order[0]
    if base not in order:
        raise UserError(f"--baseline {base!r} is none of --methods {', '.join(order)}.{nearest(base, order)}")
    settings = {
        "model": model,
        "data": data,
        "seq_len": seq_len,
        "micro_batch": micro_batch,
        "grad_accum": grad_accum,
        "steps": train.WARM + steps,
        "eval_every": 0,
        "save_every": 0,
    }
    settings |= {"compile_model": True} if compile_model else {}  # records of before the option have no such setting
    call.begin(settings | {"ranks": ranks, "zero_stage": zero_stage})
    settings |= {"peak_tflops": peak_tflops} if peak_tflops else {}  # changes no time
    with tempfile.TemporaryDirectory(prefix="leanstate-bench-") as folder:
        found = train.measure(
            own, trainer, order, settings, ranks, call.threads, rounds, base, Path(folder), say=say, keep=call.keep
        )
    call.finish(call.record(found), base)


@app.command()
def data(
    ctx: typer.Context,
    data: Annotated[str, typer.Option(help="As for `toolkit train`.")] = "stdlib",
    tokenizer: Annotated[str | None, typer.Option(help="As for `toolkit train`. (default: the model's)")] = None,
    model: Model = "qwen3-tiny",
    seq_len: SeqLen = 256,
    micro_batch: MicroBatch = 4,
    batches: Annotated[
        int, typer.Option(min=1, help="Micro-batches of a round beside steps; those as fast as they come have more.")
    ] = 64,
    step_ms: Annotated[float, typer.Option(min=0.1, help="What a step computes between two batches.")] = 50.0,
    repeats: Repeats = 7,
    threads: Threads = None,
    json_to: Json = None,
    against: Against = None,
    anyway: Anyway = False,
    tolerance: Tolerance = TOLERANCE,
    plugins: Plugins = None,
) -> None:
    """Time the data path: tokens a second while text is tokenized and from the cache, and how long a step waits.

    \b
    toolkit bench data
    toolkit bench data --data 'text/*.parquet' --model qwen3-134m --step-ms 5000
    """
    call = Call(ctx, threads, None, plugins, json_to, against, anyway, tolerance)
    import os

    from toolkit.bench import data as path
    from toolkit.run.ranks import TOKENIZER_THREADS
    from toolkit.run.settings import check_settings

    given: dict[str, Any] = {"data": data, "tokenizer": tokenizer, "model": model, "seq_len": seq_len}
    settings = check_settings(**given, micro_batch=micro_batch, eval_every=0, save_every=0)
    given |= {"micro_batch": micro_batch, "batches": batches, "step_ms": step_ms}
    call.begin(given | {"tokenizer_threads": os.environ[TOKENIZER_THREADS]})
    call.finish(call.record(path.measure(settings, batches, step_ms / 1e3, repeats, say=say)), None)


@app.command()
def save(
    ctx: typer.Context,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME=CONFIG,...",
            help="As for `toolkit compare`, saved by this package; and deepspeed, DeepSpeed's AdamW and saving.",
        ),
    ] = "amcs,adamw,deepspeed",
    model: Model = "qwen3-tiny",
    steps: Annotated[int, typer.Option(min=1, help="Training steps before the first checkpoint.")] = 4,
    repeats: Repeats = 7,
    ranks: Ranks = 1,
    zero_stage: Stage = 2,
    threads: Threads = None,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk that is measured. (default: the system's folder for such files)")
    ] = None,
    json_to: Json = None,
    against: Against = None,
    anyway: Anyway = False,
    tolerance: Tolerance = TOLERANCE,
    plugins: Plugins = None,
) -> None:
    """Time checkpoints: how long training waits, and until one is on the disk, and loading it.

    \b
    toolkit bench save
    toolkit bench save --model qwen3-134m --ranks 2 --folder /scratch
    """
    call = Call(ctx, of_a_rank(threads, ranks), None, plugins, json_to, against, anyway, tolerance)
    import tempfile

    from toolkit.bench import save
    from toolkit.bench.methods import read_each

    named = read_each(listed(methods), save.DEEPSPEED, zero_stage)
    settings = {"model": model, "steps": steps, "seq_len": 64, "micro_batch": 2, "eval_every": 0, "save_every": 0}
    if folder is not None and not folder.is_dir():
        raise UserError(f"--folder {folder} is no folder.")
    place = str((folder or Path(tempfile.gettempdir())).resolve())
    call.begin({"model": model, "steps": steps, "ranks": ranks, "zero_stage": zero_stage, "folder": place})
    with tempfile.TemporaryDirectory(prefix="leanstate-bench-", dir=folder) as scratch:
        found = save.measure(named, settings, ranks, call.threads, repeats, Path(scratch), say=say, keep=call.keep)
    call.finish(call.record(found), None)
