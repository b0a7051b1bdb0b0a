"""`toolkit sample`: text from a trained model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.checkpoint.wrong import is_exported
from toolkit.commands.checkpoint import BaseFolder, find, reading
from toolkit.errors import UserError
from toolkit.plugins import Plugins, import_plugins
from toolkit.printable import printable

if TYPE_CHECKING:
    from toolkit.inference.opened import Opened

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, a checkpoint, or a folder of `toolkit export`.")
]
Step = Annotated[
    int | None, typer.Option("--checkpoint", metavar="STEP", min=0, help="Of a run: which one. (default: the newest)")
]


def opened_run(run: Path, step: int | None, plugins: list[Path] | None, base: Path | None) -> Opened:
    """The model of a run, a checkpoint or an export, which takes seconds; so stderr says what is loaded."""
    exported = is_exported(run)
    if exported and step is not None:
        raise UserError(f"{run} is an exported model: --checkpoint is for a run, which has several.")
    if exported and base is not None:
        raise UserError(f"{run} is an exported model: --model is for a run with --lora.")
    folder = run if exported else find(run, step)
    print(f"loading {printable(str(folder))}", file=sys.stderr)
    from toolkit.run.ranks import prepare_environment, settle_accelerator

    prepare_environment()
    settle_accelerator()
    import_plugins(plugins)
    from toolkit.inference import opened

    def load(chosen: Path) -> Opened:
        if chosen != folder:
            print(f"loading {printable(str(chosen))}, which is newer", file=sys.stderr)
        return opened.open_model(chosen, base)

    return load(run) if exported else reading(run, load, step)


def sample(
    run: Run,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT...]", help="Beginnings of texts. (default: read from stdin)")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text, at most.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="Below 1 likely tokens are preferred; 0: always the likeliest.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Fixes what is drawn.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Texts for each prompt.")] = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each TEXT is a user's message, and the model's answer is printed.")
    ] = False,
    step: Step = None,
    model: BaseFolder = None,
    plugins: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Generate text with a trained model.

    \b
    toolkit sample runs/first "def main("
    toolkit sample runs/first "import " "class " --count 3 --tokens 40
    toolkit sample exported --temperature 0 --json < prompt.txt
    toolkit sample runs/tuned --chat "What is a tensor?"
    """
    from toolkit.console import progress

    settings: dict[str, Any] = {"tokens": tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if temperature == 0 and count > 1:
        raise UserError(f"--temperature 0 gives one text, always the same, and --count asks for {count}.")
    given = prompts or [_from_stdin()]
    opened = opened_run(run, step, plugins, model)
    from toolkit.inference.generate import Sampling, generate

    with progress("generating", total=len(given) * tokens) as made:
        found = generate(opened, given, Sampling(**settings, count=count, chat=chat), made)
    texts = [text for some in found for text in some]
    if as_json:
        samples = [vars(text) for text in texts]
        typer.echo(
            json.dumps({"model": str(opened.folder), "step": opened.step, **settings, "samples": samples}, indent=1)
        )
        return
    for number, text in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"{'' if number == 1 else chr(10)}--- {number} of {len(texts)}")
        print(printable(text.text if chat else text.prompt + text.text, lines=True))


def _from_stdin() -> str:
    """All of it, without the line break at its end."""
    if sys.stdin.isatty():
        print("the prompt, ended with Ctrl-D:", file=sys.stderr)
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise UserError("the prompt on stdin is no UTF-8 text.") from None
    return text.removesuffix("\n").removesuffix("\r")
