"""The `toolkit` command."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from toolkit.commands import bench as benchmarks
from toolkit.commands import checkpoint as checkpoints
from toolkit.commands.compare import compare
from toolkit.commands.doctor import doctor
from toolkit.commands.estimate import estimate, plan
from toolkit.commands.evaluate import evaluate
from toolkit.commands.fits import fits
from toolkit.commands.sample import sample
from toolkit.commands.train import train
from toolkit.errors import UserError, nearest
from toolkit.plugins import Plugins, import_plugins
from toolkit.printable import echo, printable
from toolkit.run.output import outliving
from toolkit.run.settings import RunCommand
from toolkit.run.stopping import INTERRUPTED
from toolkit.usage import USAGE_ERROR, check_given, sentence

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.command(cls=RunCommand)(train)
app.command()(sample)
app.command("eval")(evaluate)
app.add_typer(checkpoints.app, name="checkpoint", help="Inspect, verify and convert checkpoints.")
app.command()(checkpoints.export)
app.add_typer(benchmarks.app, name="bench")


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
    plugins: Plugins = None,
) -> None:
    """List the shipped DeepSpeed configurations and what each is for."""
    from toolkit.config import names_in_short, shipped_configs

    import_plugins(plugins)
    shipped = shipped_configs()
    if name is not None:
        if name not in shipped:
            hint = nearest(name, shipped) or f" {names_in_short(shipped)}"
            raise UserError(f"there is no shipped config {name!r}.{hint}")
        typer.echo(shipped[name].path.read_text(encoding="utf-8"), nl=False)
        return

    from rich.table import Table

    from toolkit.console import PlainConsole

    rules = {config.optimizer: config for config in shipped.values() if config.way == "zero2"}
    optimizers = Table("optimizer", "type", "state", "what it does", box=None)
    for kind, config in sorted(rules.items(), key=lambda item: item[0].lower()):
        optimizers.add_row(kind.lower(), kind, config.state_format, config.idea)
    ways = Table("way", "of", "what it is for", box=None)
    for way, config in sorted({config.way: config for config in shipped.values()}.items()):
        of = sorted(other.optimizer.lower() for other in shipped.values() if other.way == way)
        ways.add_row(way, "all" if len(of) == len(rules) else ", ".join(of), config.placing)
    console = PlainConsole()
    console.print_line("The name of a configuration is <optimizer>_<way>, such as amcs_zero2.\n")
    console.print(optimizers, "", ways, sep="\n")


class ReportFormat(StrEnum):
    HTML = "html"
    MARKDOWN = "markdown"
    JSON = "json"
    ALL = "all"


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; the first is what others are compared with.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="A folder, or a file where it is one format. (default: the first run's folder)")
    ] = None,
    formats: Annotated[
        list[ReportFormat] | None, typer.Option("--format", help="What to write; repeatable. (default: all)")
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Report what runs took and why: a page, Markdown and JSON."""
    from toolkit.report import build_report, report_paths, write_report

    import_plugins(plugins)
    paths = report_paths(runs, out, () if formats is None or ReportFormat.ALL in formats else formats)
    built = build_report(runs)
    write_report(built, paths)
    echo(built.headline)
    for gap in built.gaps:
        echo(f"not like for like: {gap}")
    for run in built.runs:
        for problem in run.problems:
            echo(f"{run.name}: {problem.sentence}")
    for path in paths.values():
        echo(f"written: {path}")


app.command()(estimate)
app.command()(plan)
app.command()(fits)
app.command()(doctor)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(compare)


def main() -> None:
    """Run the command; what the user can mend ends it with one line on stderr and exit status 2."""
    with outliving():
        try:
            check_given(sys.argv[1:])
            status = app(standalone_mode=False)
        except UserError as error:
            problem = str(error)
        except USAGE_ERROR as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # a group of commands, and none of them named
                error.show()
                raise SystemExit(2) from None
            problem = sentence(error)
        except (KeyboardInterrupt, typer.Abort):
            raise SystemExit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except OSError as error:  # what the file system refuses
            problem = f"{error.filename or type(error).__name__}: {error.strerror or error}."
        else:
            raise SystemExit(status or 0)
        print(f"error: {printable(problem)}", file=sys.stderr)
        raise SystemExit(2)
