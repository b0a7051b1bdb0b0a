"""What a user can ask of a run: one typed model that is also the command line."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from toolkit.command import App
from toolkit.completion import config_names, model_names
from toolkit.errors import UserError
from toolkit.plugins import plugin_option
from toolkit.records.activations import HELP, Written
from toolkit.records.lora import Written as Adapters
from toolkit.run.tracking import Tracker
from toolkit.sentences import refused
from toolkit.usage import USAGE_ERROR, check_given, sentence

T = TypeVar("T")
AUTO, NONE = "auto", "none"
"""The learning rate that `toolkit.run.range_test` finds."""


class RunSettings(BaseModel):
    """The settings of one training run; what DeepSpeed or the optimizer owns stays in the DeepSpeed JSON.

    Flags that have a twin in the JSON (`micro_batch`, `lr`, `warmup`, ...) are written over it by
    `toolkit.run.merge.merge_flags`; None leaves the JSON's value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Annotated[
        str,
        typer.Option(
            help="A preset, a folder with a Hugging Face model, or its hub name, once downloaded.",
            autocompletion=model_names,
        ),
    ] = "qwen3-tiny"
    from_checkpoint: Annotated[
        bool, typer.Option("--from-checkpoint", help="Start from the weights in the model's folder.")
    ] = False
    tokenizer: Annotated[
        str | None,
        typer.Option(help="mistral-32k, python-4k, a folder or file, or a hub name. (default: the preset's)"),
    ] = None
    data: Annotated[str, typer.Option(help="fineweb, stdlib, or a path or glob to parquet, jsonl or text files.")] = (
        "stdlib"
    )
    data_subset: Annotated[str | None, typer.Option(help="Configuration name of a hub data set.")] = None
    text_column: Annotated[str, typer.Option(help="The column that holds the text, or conversations.")] = "text"
    chat_template: Annotated[
        str | None,
        typer.Option(metavar="FILE|chatml", help="Chat template for conversations. (default: the tokenizer's)"),
    ] = None
    bad_documents: Annotated[
        Literal["skip", "stop"],
        typer.Option(help="Documents that cannot be read or tokenized: skip and count them, or stop at the first."),
    ] = "skip"
    val_data: Annotated[
        str | None,
        typer.Option(help="Validation text, named like --data. (default: a slice held out of --data)"),
    ] = None
    config: Annotated[
        str,
        typer.Option(
            "--config",
            autocompletion=config_names,
            help="A shipped configuration's name or the path of a DeepSpeed JSON.",
        ),
    ] = "amcs_zero2"
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Overwrite one key of the JSON; repeatable."),
    ] = []
    plugins: Annotated[list[Path], plugin_option()] = []
    steps: Annotated[int, Field(gt=0), typer.Option(help="Optimizer steps.")] = 200
    seq_len: Annotated[int, Field(gt=0), typer.Option(help="Predictions per sequence.")] = 256
    micro_batch: Annotated[
        int | None,
        Field(gt=0),
        typer.Option(help="Sequences per rank and forward pass. (default: the JSON's)"),
    ] = None
    grad_accum: Annotated[
        int | None, Field(gt=0), typer.Option(help="Micro-batches per optimizer step. (default: the JSON's)")
    ] = None
    global_batch: Annotated[
        int | None,
        Field(gt=0),
        typer.Option(help="Sequences per optimizer step, all ranks. (default: the JSON's)"),
    ] = None
    lr: Annotated[
        Annotated[float, Field(gt=0)] | Literal["auto"] | None,
        typer.Option(
            metavar="X|auto",
            parser=str,
            help="Peak learning rate; auto: what a range test before the run finds. (default: the JSON's)",
        ),
    ] = None
    warmup: Annotated[
        float | None,
        Field(ge=0),
        typer.Option(help="Warm-up: a fraction of the run below 1, else steps. (default: the JSON's share of its run)"),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**63), typer.Option(help="Fixes the initial weights and the data order.")] = 0
    eval_every: Annotated[
        int, Field(ge=0), typer.Option(help="Steps between validations (always one at the end); 0 for none.")
    ] = 100
    eval_sequences: Annotated[int, Field(gt=0), typer.Option(help="Sequences per validation.")] = 32
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run's files go. (default: runs/<model>-<config>-<time>)")
    ] = None
    save_every: Annotated[
        int, Field(ge=0), typer.Option(help="Steps that may be lost at most: sets when checkpoints begin; 0 for none.")
    ] = 100
    keep_last: Annotated[int, Field(gt=0), typer.Option(help="Newest checkpoints to keep.")] = 2
    keep_every: Annotated[
        int, Field(ge=0), typer.Option(help="Save and keep multiples of so many steps, too; 0 for none.")
    ] = 0
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|none|PATH",
            help="Resume from the run folder's newest valid checkpoint, from none, or from a run or checkpoint.",
        ),
    ] = "auto"
    convert_state: Annotated[
        bool, typer.Option("--convert-state", help="Resume with another state format, weights or optimizer.")
    ] = False
    trust_pickle: Annotated[
        bool,
        typer.Option(
            "--trust-pickle",
            help="Resume from a checkpoint without manifest that holds objects of any class: this runs whatever code "
            "its files name.",
        ),
    ] = False
    max_skipped: Annotated[
        int, Field(gt=0), typer.Option(help="Steps skipped in a row (gradients not finite) that stop the run.")
    ] = 20
    activations: Annotated[
        Written | None, typer.Option(metavar="WORDS", parser=str, help=f"{HELP} (default: the preset's)")
    ] = None
    loss: Annotated[
        Literal["chunked", "plain"] | None,
        typer.Option(help="chunked never builds the full logits. (default: the preset's)"),
    ] = None
    lora: Annotated[
        Adapters | None,
        typer.Option(
            metavar="r=16,...",
            parser=str,
            help="Train adapters alone: some of r=16,alpha=32,targets=all-linear,dropout=0 with commas.",
        ),
    ] = None
    compile_model: Annotated[
        bool,
        typer.Option(
            "--compile-model", help="Compile the model's blocks, too: shorter steps, a longer start. Not at ZeRO 3."
        ),
    ] = False
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits from the same run on a GPU, too; slower there.")
    ] = False
    memory_profile: Annotated[
        Literal["off", "summary", "full"],
        typer.Option(help="What is measured of memory; full traces every allocation of step 3."),
    ] = "summary"
    peak_tflops: Annotated[
        float | None,
        Field(gt=0),
        typer.Option(help="TFLOP/s that each rank's device can do, for the MFU. (default: known for some GPUs)"),
    ] = None
    start_anyway: Annotated[
        bool, typer.Option("--start-anyway", help="Start a run that is predicted not to fit into memory.")
    ] = False
    track: Annotated[
        Tracker | None,
        typer.Option(help="Curves of all steps, by one of these packages, beside metrics.jsonl. (default: none)"),
    ] = None
    print_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON in the end; what happens goes to stderr.")
    ] = False

    @field_validator("lr", mode="before")
    @classmethod
    def _rate(cls, value: Any) -> Any:
        if not isinstance(value, str) or value == AUTO:
            return value
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"must be a rate, as in 1e-3, or {AUTO}") from None

    @field_validator("warmup")
    @classmethod
    def _whole_steps(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("must be a fraction below 1 or a whole number of steps")
        return value

    @property
    def tracker(self) -> Tracker | None:
        """What draws curves; "none", which a resumed run is told apart from what is left open by, is None."""
        return None if self.track == NONE else self.track

    @property
    def rate(self) -> float | None:
        """The learning rate that is given as a number."""
        return None if self.lr == AUTO else self.lr  # type: ignore[return-value]

    def overridden(self) -> list[str]:
        """The keys of the JSON that `--set` names."""
        return [assignment.partition("=")[0].strip() for assignment in self.overrides]


_PARTS = {
    "Model and data": (
        *("model", "from_checkpoint", "tokenizer", "lora"),
        *("data", "data_subset", "text_column", "chat_template", "bad_documents", "val_data"),
    ),
    "Optimizer, batch and length": (
        *("config", "overrides", "plugins", "lr", "warmup", "steps", "seq_len"),
        *("micro_batch", "grad_accum", "global_batch", "seed", "eval_every", "eval_sequences", "max_skipped"),
    ),
    "Files and checkpoints": (
        *("run_dir", "save_every", "keep_last", "keep_every", "resume", "convert_state", "trust_pickle"),
        *("track", "print_json"),
    ),
    "Memory and arithmetic": (
        *("activations", "loss", "compile_model", "memory_profile", "peak_tflops"),
        *("start_anyway", "deterministic"),
    ),
}
"""The settings as help shows them."""


def check_settings(**values: Any) -> RunSettings:
    """`RunSettings(**values)`, with the first complaint as one sentence that names the flag.

    Raises:
        UserError: a value is of the wrong type or outside its range.
    """
    try:
        return RunSettings(**values)
    except ValidationError as error:
        raise UserError(refused(flag_of(str(error.errors()[0]["loc"][0])), error)) from None


def flag_of(name: str) -> str:
    """The command-line flag of a field of `RunSettings`."""
    option = _option(name)
    return option.default.split("/")[0] if isinstance(option.default, str) else "--" + name.replace("_", "-")


def _option(name: str) -> Any:
    metadata = RunSettings.model_fields[name].metadata
    return next(item for item in metadata if isinstance(item, typer.models.OptionInfo))


def taking_settings(command: Callable[..., T]) -> Callable[..., T]:
    """`command` with an option for each field of `RunSettings` in the place of its `**values`, before its own ones.

    So a setting is declared, typed and described in one place. `command` takes the context first; see `given`.
    """
    context, *own = inspect.signature(command, eval_str=True).parameters.values()
    for part, names in _PARTS.items():
        for name in names:
            _option(name).rich_help_panel = part
    fields = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.get_default(call_default_factory=True),
            annotation=Annotated[str | None if _option(name).parser is str else field.annotation, _option(name)],
        )
        for name, field in RunSettings.model_fields.items()
    ]
    own = [one for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (context, *fields, *own)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def given(ctx: typer.Context, values: Mapping[str, Any]) -> RunSettings:
    """The settings among the `values` of a command's options, as `ctx` got them.

    What is typed is told from what is left open (`model_fields_set`): a run that is resumed keeps the latter.

    Raises:
        UserError: a value is outside its range.
    """
    typed = {name for name in values if str(ctx.get_parameter_source(name)).endswith("COMMANDLINE")}
    return check_settings(**{name: values[name] for name in RunSettings.model_fields if name in typed})


def parse(arguments: Sequence[str] | None = None) -> RunSettings | None:
    """The settings that a command line gives (`sys.argv` if None), or None where it asked for help.

    The options are the fields of `RunSettings`, beside those that DeepSpeed's launcher adds.

    Raises:
        UserError: an unknown option, a missing value, a value of the wrong type or outside its range.
    """
    app = App()
    app.command()(_train)
    line = list(sys.argv[1:] if arguments is None else arguments)
    check_given(line)
    try:
        result = typer.main.get_command(app).main(line, standalone_mode=False)
    except USAGE_ERROR as error:
        raise UserError(sentence(error)) from None
    return result if isinstance(result, RunSettings) else None


@taking_settings
def _train(
    ctx: typer.Context,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", hidden=True)] = True,
    **values: Any,
) -> RunSettings:
    """Train a language model with DeepSpeed.

    \b
    deepspeed --num_gpus 2 launch/train.py --model qwen3-tiny --steps 50
    """
    # The launcher's own options stay out: the rank is read from the environment, and DeepSpeed is always on.
    return given(ctx, values)


def line_of(settings: Mapping[str, Any]) -> list[str]:
    """The options that give `settings`, by the names of the fields of `RunSettings`; what is None is left out."""
    line = []
    for name, value in settings.items():
        flag = flag_of(name)
        if isinstance(value, bool):
            line += [flag] if value else []
        elif value is not None:
            line += [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    return line
