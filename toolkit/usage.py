"""What is wrong with a command line, in one sentence that says what to type instead."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from toolkit.errors import UserError, nearest
from toolkit.sentences import refused

# Typer's base of every complaint about the command line; its home has moved between versions.
USAGE_ERROR: Any = typer.BadParameter.__base__

SHELL_PATH = "LEANSTATE_SHELL_PATH"
"""The variable with the PATH of the user's shell, from what runs with another one: `make train`."""
_LAUNCHER = (
    "--local_rank",
    "that is an option of the launcher and goes before the script: deepspeed --num_gpus N [...] launch/train.py [...]; "
    "toolkit train takes it anywhere",
)
_MICRO, _GLOBAL = (
    "--micro-batch (sequences per rank and forward pass)",
    "--global-batch (sequences per step, all ranks)",
)


def _set(*examples: str) -> tuple[str, str]:
    return "--set", "that is part of the DeepSpeed JSON: " + " or ".join(f"--set {one}" for one in examples)


# Options that mean the same under other names, without dashes: of DeepSpeed, the Hugging Face Trainer and others.
# Of each row a command has at most one, and takes all of them for it.
_SAME: tuple[tuple[str, ...], ...] = (
    (
        *("micro-batch", "micro-batch-size", "per-device-train-batch-size", "per-device-batch-size"),
        *("per-gpu-train-batch-size", "train-micro-batch-size-per-gpu", "mbs"),
    ),
    ("global-batch", "global-batch-size", "gbs"),
    ("grad-accum", "gradient-accumulation-steps", "gradient-accumulation", "accumulation", "gas"),
    ("lr", "learning-rate", "max-lr", "peak-lr"),
    ("steps", "max-steps", "num-steps", "train-iters", "max-iters", "total-steps", "iters", "iterations"),
    (
        *("seq-len", "seq-length", "sequence-length", "max-length", "max-seq-len", "max-seq-length"),
        *("block-size", "context-length"),
    ),
    ("run-dir", "output-dir", "save-dir", "checkpoint-dir"),
    ("save-every", "save-steps", "save-interval", "checkpoint-every"),
    ("eval-every", "eval-steps", "eval-interval"),
    ("keep-last", "save-total-limit"),
    ("warmup", "warmup-steps", "warmup-iters"),
    ("resume", "resume-from-checkpoint", "resume-from", "load-checkpoint"),
    ("model", "model-name-or-path", "model-name", "model-path"),
    ("data", "dataset", "dataset-name", "train-file", "train-data", "data-path"),
    ("val-data", "validation-file", "val-file", "eval-data"),
    ("data-subset", "dataset-config-name"),
    ("tokenizer", "tokenizer-name", "tokenizer-path"),
    ("config", "deepspeed-config", "ds-config", "config-file"),
    ("stage", "zero-stage"),
    ("ranks", "gpus", "num-gpus", "ngpus", "n-gpus", "nproc-per-node", "num-processes", "world-size"),
    ("nodes", "num-nodes", "nnodes", "n-nodes"),
    ("gpu-memory", "gpu-mem", "vram", "gpu-memory-gb"),
    ("host-memory", "cpu-memory", "host-mem", "ram"),
    ("to", "out", "output"),
    ("push", "push-to-hub", "hub-model-id"),
    ("from-checkpoint", "from-pretrained"),
    ("tokens", "max-new-tokens", "max-tokens"),
    ("count", "num-return-sequences"),
    ("track", "report-to", "tracker", "log-with"),
    ("compile-model", "torch-compile", "compile"),
)
_ROW = {name: row for row in _SAME for name in row}

# Names that are near to an option and not the same: options, with what tells them apart, or a sentence for commands
# that have the option before it. Of those that fit the command the first sentence, or all options.
_INSTEAD: dict[tuple[str, ...], tuple[str | tuple[str, str], ...]] = {
    ("optimizer", "optim", "opt"): (
        ("--config", "the configuration names it: --config amcs_zero2, soam_zero2, adamw_zero2, ... (toolkit configs)"),
    ),
    ("batch-size", "batch", "bs", "train-batch-size", "batchsize"): (_MICRO, _GLOBAL),
    ("total-batch-size",): (_GLOBAL,),
    _ROW["global-batch"]: (("--micro-batch", "that is --micro-batch times --grad-accum times the ranks"),),
    ("lr-rate", "rate"): ("--lr",),
    ("epochs", "epoch", "num-epochs", "num-train-epochs", "n-epochs"): (
        ("--steps", "a run's length is --steps, in optimizer steps of (global batch x --seq-len) tokens"),
    ),
    ("length", "context"): ("--seq-len",),
    ("output-dir", "output", "out", "save-dir", "out-dir", "checkpoint-dir", "logdir"): ("--run-dir", "--out"),
    ("eval-freq",): ("--eval-every",),
    ("warmup-ratio",): (("--warmup", "a fraction of the run is --warmup below 1, as in --warmup 0.1"),),
    ("load",): ("--resume",),
    (
        "activation-checkpointing",
        "no-activation-checkpointing",
        "gradient-checkpointing",
        "no-gradient-checkpointing",
        "checkpoint-activations",
        "recompute",
    ): (("--activations", "that is --activations checkpoint, and without it --activations full"),),
    ("pretrained",): ("--model",),
    # DeepSpeed's --deepspeed is a flag and the Trainer's takes a file, so it is no other name of --config.
    ("deepspeed",): (("--config", "the DeepSpeed JSON is given with --config, and every run uses DeepSpeed"),),
    ("logging-steps", "log-every", "log-interval"): (
        ("--steps", "every step is in metrics.jsonl, and --steps is the length of the run"),
    ),
    ("logging-dir", "run-name"): (("--run-dir", "--run-dir names the folder for all files of a run"),),
    ("do-train", "do-eval"): (("--eval-every", "a run trains, and --eval-every says how often it validates"),),
    ("use-peft", "lora-r", "lora-rank", "lora-alpha", "lora-dropout", "lora-target-modules"): (
        ("--lora", "adapters are --lora with all of it: --lora r=16,alpha=32,targets=all-linear,dropout=0"),
    ),
    ("bf16", "fp16", "dtype", "precision", "mixed-precision"): (
        "--dtype",
        _set("bf16.enabled=true", "fp16.enabled=true"),
    ),
    ("zero-stage", "stage", "zero"): ("--zero-stage", _set("zero_optimization.stage=2")),
    ("weight-decay", "wd"): (_set("optimizer.params.weight_decay=0.1"),),
    ("betas", "beta1", "beta2", "adam-beta1", "adam-beta2"): (_set("'optimizer.params.betas=[0.9, 0.95]'"),),
    ("max-grad-norm", "clip", "clip-grad", "gradient-clipping", "grad-clip"): (_set("gradient_clipping=1.0"),),
    ("lr-scheduler", "scheduler", "lr-scheduler-type", "schedule"): (_set("scheduler.type=WarmupCosineLR"),),
    ("state-format", "format", "state"): ("--state-format", "--format", _set("optimizer.params.state_format=compact")),
    _ROW["ranks"]: (_LAUNCHER,),
    _ROW["nodes"]: (_LAUNCHER,),
    ("master-port", "master-addr", "hostfile", "include", "exclude", "node-rank", "no-ssh", "launcher"): (_LAUNCHER,),
    ("memory",): ("--gpu-memory",),
}
_BY_NAME = {name: instead for names, instead in _INSTEAD.items() for name in names}


def same_option(name: str, known: Iterable[str]) -> str | None:
    """Which of the `known` options `name` (with its dashes) is another name of, or another spelling; None: of none."""
    row = row_of(name)
    return next((option for option in known if option[:2] == "--" and _plain(option) in row), None)


def row_of(option: str) -> tuple[str, ...]:
    """All names of what `option` is a name of, without dashes."""
    return _ROW.get(_plain(option), (_plain(option),))


def _plain(option: str) -> str:
    return option.lstrip("-").lower().replace("_", "-")


def sentence(error: Any) -> str:
    """The complaint `error`, a `USAGE_ERROR`, in one line."""
    known = _options(error.ctx)
    if (name := getattr(error, "option_name", None)) is not None and type(error).__name__ == "NoSuchOption":
        return f"there is no option {name}{_instead(name, known)}"
    said = " ".join(error.format_message().split())
    parameter, kind = getattr(error, "param", None), type(error).__name__
    if isinstance(error.__cause__, ValidationError) and parameter is not None:
        said = refused(parameter.opts[0], error.__cause__)
        if " at most " in said and _plain(parameter.opts[0]) in _ROW["ranks"] and "--nodes" in known:
            return f"{said[:-1]}; machines are --nodes."
    elif kind == "MissingParameter" and parameter is not None and parameter.help:
        name = said.partition("'")[2].rpartition("'")[0].removesuffix("...")
        return f"{name} is missing: {parameter.help[0].lower()}{parameter.help[1:]}"
    elif extra := said.partition("unexpected extra argument")[2].partition("(s) ")[2].strip("()"):
        hint = "a DeepSpeed JSON is given with --config" if ".json" in extra and "--config" in known else "see --help"
        said = f"there is no place for {extra!r}; {hint}."
    elif said.startswith("No such command") and (commands := getattr(error.ctx.command, "commands", None)):
        said = said if said.endswith("?") else f"{said.rstrip('.')}; there are {', '.join(commands)}."
    return said if said.endswith((".", "?", ")")) else f"{said}."


def _options(context: Any) -> list[str]:
    """The long options of the command that was called, hidden ones too."""
    if context is None:
        return []
    return [name for one in context.command.params for name in (*one.opts, *one.secondary_opts) if name[:2] == "--"]


def _instead(name: str, known: Sequence[str]) -> str:
    plain = _plain(name)
    options: list[str] = []
    for one in _BY_NAME.get(plain, ()):
        if isinstance(one, str) and one.partition(" ")[0] in known:
            options.append(one)
        elif not isinstance(one, str) and one[0] in known and not options:
            return f": {one[1]}."
    if options:
        return f". Use {' or '.join(options)}."
    hint = nearest(f"--{plain}", known)
    return f".{hint}" if hint else "; --help lists what there is."


def check_given(arguments: Iterable[str]) -> None:
    """Refuse values that are empty, as of a shell variable that is not set: "" would be taken for the folder here.

    Raises:
        UserError: names the option.
    """
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if argument == "" or (equals and not value and option.startswith("--")):
            name = option or before
            where = f"{name} is empty" if name.startswith("-") else "an argument is empty"
            raise UserError(f"{where}; is a variable of the shell not set?")
        before = argument


def to_type(command: str) -> str:
    """`command`, of `toolkit`, as it can be typed here: with the program's path where the shell would not find it."""
    own = Path(sys.executable).with_name("toolkit")
    found = shutil.which("toolkit", path=os.environ.get(SHELL_PATH))
    if not own.exists() or (found is not None and os.path.samefile(found, own)):
        return command
    here = Path.cwd()
    path = str(own.relative_to(here) if own.is_relative_to(here) else own)
    return shlex.quote(path) + command.removeprefix("toolkit")
