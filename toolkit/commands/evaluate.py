"""`toolkit eval`: how well a trained model predicts a text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.commands.checkpoint import BaseFolder
from toolkit.commands.sample import Run, Step, opened_run
from toolkit.errors import UserError
from toolkit.plugins import Plugins
from toolkit.printable import echo, printable
from toolkit.records.sizes import counted

if TYPE_CHECKING:
    from toolkit.inference.evaluate import Evaluation


def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(
            help="stdlib, or a path or glob to parquet, jsonl or text files. (default: what the run validates on)"
        ),
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="The column of --data that holds the text, or conversations.")
    ] = "text",
    sequences: Annotated[
        int | None, typer.Option(min=1, help="At most so many. (default: the run's, and of --data all)")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=1, help="Predictions per sequence. (default: the run's; of an exported model 256)"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness instead; needs the package lm_eval."),
    ] = None,
    step: Step = None,
    model: BaseFolder = None,
    plugins: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a trained model: loss, perplexity and bits per byte of a text.

    \b
    toolkit eval runs/first
    toolkit eval runs/first --data book.txt --seq-len 512
    toolkit eval exported --data 'held/*.jsonl' --sequences 100 --json
    toolkit eval runs/first --tasks lambada_openai,arc_easy
    """
    from toolkit.console import progress
    from toolkit.records.run import strict

    if tasks is not None:
        _evaluate_tasks(run, tasks, (data, sequences, seq_len), step, model, plugins, as_json)
        return
    opened = opened_run(run, step, plugins, model)
    from toolkit.inference import evaluate as measure

    if data is None:
        text = measure.own_text(opened, sequences, seq_len)
    else:
        text = measure.text_of(opened, data, text_column, sequences, seq_len)
    with progress("evaluating", total=text.count) as done:
        found = measure.evaluate(opened, text, done)
    skipped, cut = text.packed.position.skipped, text.packed.position.cut
    remarks = [*text.remarks, *_left_out(skipped, "document that cannot be used", "documents that cannot be used")]
    longer = ("conversation longer than --seq-len", "conversations longer than --seq-len")
    remarks += _left_out(cut, *longer, "cut at the end")
    for remark in remarks:
        print(f"note: {printable(remark)}", file=sys.stderr)
    figures = {**vars(found), "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
    if as_json:
        typer.echo(json.dumps(strict({"model": str(opened.folder), "step": opened.step, **figures}), indent=1))
        return
    echo(f"data           {found.data}: {_sequences(found)}")
    stand = "stands" if found.tokens == 1 else "stand"
    echo(f"tokens         {found.tokens:,}, which {stand} for {counted(found.bytes, 'byte')}")
    echo(f"loss           {found.loss:.4f} nats per token")
    echo(f"perplexity     {found.perplexity:,.2f}")
    echo(f"bits per byte  {found.bits_per_byte:.4f}")


def _left_out(count: int, one: str, many: str, what: str = "left out") -> list[str]:
    return [f"{counted(count, one, many)} {'is' if count == 1 else 'are'} {what}."] if count else []


def _sequences(found: Evaluation) -> str:
    if found.sequences == 1:
        return f"1 sequence of {counted(found.last_seq_len, 'token')}"
    shorter = f", the last of {found.last_seq_len:,}" if found.last_seq_len < found.seq_len else ""
    return f"{found.sequences:,} sequences of {counted(found.seq_len, 'token')}{shorter}"


def _evaluate_tasks(
    run: Any, tasks: str, others: Any, step: int | None, model: Path | None, plugins: Any, as_json: bool
) -> None:
    from toolkit.commands.bench_call import listed
    from toolkit.inference import tasks as harness

    if any(one is not None for one in others):
        raise UserError("--tasks bring their own text: leave --data, --sequences and --seq-len out.")
    harness.check(listed(tasks))
    opened = opened_run(run, step, plugins, model)
    found = harness.evaluate(opened, listed(tasks))
    if as_json:
        typer.echo(json.dumps({"model": str(opened.folder), "step": opened.step, "tasks": found}, indent=1))
        return
    for task, figures in found.items():
        for name, value in figures.items():
            echo(f"{task}  {name}  {value:.4f}" if isinstance(value, float) else f"{task}  {name}  {value}")
