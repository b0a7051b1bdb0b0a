"""`toolkit bench`: how fast this machine is, and what became slower."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from toolkit.bench.against import TOLERANCE
from toolkit.errors import UserError
from toolkit.plugins import Plugins, import_plugins

if TYPE_CHECKING:
    from toolkit.bench.record import Record
    from toolkit.bench.step import Measured

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
Json = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write all figures as JSON; - is stdout.")]
Against = Annotated[
    Path | None,
    typer.Option(help="JSON of an earlier call: say what is slower; exit status 1 where anything is."),
]
Anyway = Annotated[
    bool, typer.Option("--anyway", help="Compare with a file of another machine or other settings, too.")
]
Tolerance = Annotated[float, typer.Option(min=0.0, help="What a median may be above the earlier one, as a fraction.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the CPU. (default: the cores there are)")]
Repeats = Annotated[int, typer.Option(min=7, help="Rounds that are timed; in each everything is measured once.")]
_SLOWER = 1
_OPTIONS = {
    "step": ("optimizers", "parameters", "model", "baseline", "repeats", "threads", "device", "growth"),
}
"""Options that are kept with what was measured. Plug-ins are not: a file must not say which code is run."""
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
        raise UserError(f"give what to measure ({', '.join(_OPTIONS)}), or --against FILE.")
    from toolkit.bench.record import read

    before = read(against)
    known = _OPTIONS[before.command]
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
            help="Rules of this package with state format and weights (fp32, master, bf16+16, bf16+8, bf16+4), and "
            "others: torch-adamw, deepspeed-cpu-adam, bnb-adamw8bit, bnb-ademamix8bit (fp32, bf16, master), "
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
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="(default: a GPU, where there is one)")] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="From 1M parameters up to --parameters, and from 10 to 10,000 tensors.")
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
    call = _Call(ctx, threads, device, plugins, json_to, against, anyway, tolerance)
    from toolkit.bench import shapes, step
    from toolkit.bench.contenders import DEFAULT, read_contenders

    given = (optimizers or ",".join(_GROWING if growth else DEFAULT)).split(",")
    contenders = read_contenders([name for part in given if (name := part.strip())])
    base = None if baseline is None else read_contenders([baseline])[0].name
    if growth:
        largest = shapes.parse_count(parameters or _LARGEST, where="--parameters")
        call.begin({"growth": True, "parameters": largest})
        found = step.growth(contenders, largest, call.device, repeats, base, say=_say)
    else:
        if model is not None:
            chosen = shapes.of_model(model)
        else:
            chosen = shapes.even(shapes.parse_count(parameters or _PARAMETERS, where="--parameters"))
        call.begin({"model": model, "parameters": chosen.parameters, "tensors": chosen.tensors})
        found = step.measure(contenders, chosen, call.device, repeats, base, say=_say)
    record = call.record(found)
    if plot is not None:
        from toolkit.bench.show import plot as draw

        draw(record, plot)
    call.finish(record, base or next(row.name for row in record.rows if row.name != step.COPY))


def _say(words: str) -> None:
    typer.echo(words, err=True)


class _Call:
    """One call of a command below `bench`: what all of them do before and after they measure."""

    def __init__(
        self,
        ctx: typer.Context,
        threads: int | None,
        device: Literal["cpu", "cuda"] | None,
        plugins: list[Path] | None,
        json_to: str | None,
        against: Path | None,
        anyway: bool,
        tolerance: float,
    ) -> None:
        from toolkit.bench.record import load_average, read

        self._load = load_average()
        self._ctx, self._json_to, self._against, self._tolerance = ctx, json_to, against, tolerance
        self._anyway = anyway
        self._before = None if against is None else read(against)
        self._settings: dict[str, Any] = {}
        _prepare(threads)
        import_plugins(plugins)
        self.device = _device(device)

    def begin(self, settings: dict[str, Any]) -> None:
        """Nothing is measured yet. Raises UserError where the earlier record is not of the same."""
        from toolkit.bench.against import check
        from toolkit.bench.step import Measured

        self._settings = settings
        if self._before is not None and self._against is not None:
            check(self._before, self.record(Measured()), self._against, anyway=self._anyway)

    def record(self, found: Measured) -> Record:
        from toolkit.bench.record import Record, machine, now
        from toolkit.run.folder import versions

        name: Any = self._ctx.info_name
        return Record(
            command=name,
            settings=self._settings,
            options={key: self._ctx.params[key] for key in _OPTIONS[name]},
            machine=machine(self.device),
            load=self._load,
            began=now(),
            versions=versions(),
            rows=found.rows,
            left_out=found.left_out,
            notes=found.notes,
        )

    def finish(self, record: Record, baseline: str | None) -> None:
        """Show and write the record, and compare it with the earlier one."""
        from toolkit.bench.against import compare
        from toolkit.bench.record import record_text, write
        from toolkit.bench.show import show, show_changes
        from toolkit.console import PlainConsole

        if self._json_to == "-":
            typer.echo(record_text(record), nl=False)
        elif self._json_to is not None:
            write(record, Path(self._json_to))
        console = PlainConsole(stderr=self._json_to == "-")
        show(record, console, baseline)
        if self._before is not None and self._against is not None:
            changes = compare(self._before, record, self._against, self._tolerance)
            show_changes(changes, console, self._against)
            if any(change.slower for change in changes):
                raise typer.Exit(_SLOWER)


def _prepare(threads: int | None) -> None:
    """Before torch is imported: how many threads there are, for it and for what brings an OpenMP of its own."""
    from toolkit.run import leftovers, ranks

    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    ranks.prepare_environment()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    ranks.settle_accelerator()
    leftovers.own_build_folder()


def _device(asked: Literal["cpu", "cuda"] | None) -> Literal["cpu", "cuda"]:
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UserError("--device is cuda, but torch finds no GPU here.")
    return asked or ("cuda" if there else "cpu")
