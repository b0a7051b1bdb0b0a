"""The `toolkit` command, which is also named `leanstate`."""

from __future__ import annotations

import gc
import sys
from typing import Annotated, Any

import typer

from toolkit.command import App, Group
from toolkit.commands import bench as benchmarks
from toolkit.commands import checkpoint as checkpoints
from toolkit.commands.compare import compare
from toolkit.commands.configs import configs
from toolkit.commands.doctor import doctor
from toolkit.commands.estimate import estimate, plan
from toolkit.commands.evaluate import evaluate
from toolkit.commands.fits import fits
from toolkit.commands.report import report
from toolkit.commands.sample import sample
from toolkit.commands.train import train
from toolkit.errors import UserError
from toolkit.printable import printable
from toolkit.run.output import outliving
from toolkit.run.stopping import INTERRUPTED
from toolkit.usage import USAGE_ERROR, check_given, sentence

ORDER = (
    *("fits", "estimate", "plan", "train", "report", "compare", "sample", "eval", "export", "checkpoint"),
    *("configs", "doctor", "bench"),
)
"""As a user comes to need them."""


_SELDOM = (50_000, 20, 1000)
"""How often Python looks for garbage. By its own measure a fifth of a command's time goes into looking through what was
imported, which stays."""


class _InOrder(Group):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=ORDER.index)


app = App(cls=_InOrder, completion=True)
for command in (fits, estimate, plan, train, report, sample, configs, doctor):
    app.command()(command)
app.command("eval")(evaluate)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(compare)
app.command()(checkpoints.export)
app.add_typer(checkpoints.app, name="checkpoint")
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
    """Memory-efficient training with DeepSpeed.

    \b
    toolkit fits --gpu-memory 24GB
    toolkit train --model qwen3-tiny --steps 50
    toolkit COMMAND --help
    """


def main() -> None:
    """Run the command; what the user can mend ends it with one line on stderr and exit status 2."""
    gc.set_threshold(*_SELDOM)
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
