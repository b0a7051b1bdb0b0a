"""What all commands of `toolkit` have in common: help that cuts no word, and options by every usual name."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from textwrap import TextWrapper
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from toolkit.usage import same_option

PROJECT = "leanstate"
"""The other name of the command `toolkit`: who types it reads it in the examples."""
_WIDEST = 120
"""Columns of a help page, at most: longer lines are hard to read."""
_COLUMN = 26
"""Of the names of options, at most; what is longer has its description below it."""
_ALONE = {"--resume": "auto", "--json": "-"}
"""Options that take a value and may stand without: what they mean then."""

_VALUES = {
    "baseline": "NAME",
    "config": "NAME|FILE",
    "data": "NAME|PATH",
    "data_subset": "NAME",
    "dtype": "bf16|fp16|fp32",
    "exclude": "RANKS",
    "folder": "FOLDER",
    "gpu_memory": "SIZE",
    "host_memory": "SIZE",
    "hostfile": "FILE",
    "include": "RANKS",
    "launcher": "NAME",
    "master_addr": "HOST",
    "model": "NAME|FOLDER",
    "name": "NAME",
    "optimizer": "NAME",
    "out": "PATH",
    "parameters": "COUNT",
    "path": "RUN",
    "plot": "FILE",
    "plugins": "FILE",
    "push": "OWNER/NAME",
    "run_dir": "FOLDER",
    "text_column": "NAME",
    "to": "FOLDER",
    "tokenizer": "NAME|PATH",
    "val_data": "NAME|PATH",
    "against": "FILE",
}
"""What an option takes, by its name in the code: the same word in every command."""


class Command(TyperCommand):
    """A command whose help fits the terminal, and whose options may have the names that other programs use."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_spelt(self, args)))

    def get_help(self, ctx: Any) -> str:
        return page(self, ctx)


class Group(TyperGroup):
    """Commands under one name, with help of the same kind."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # What follows a command is that command's own.
        own = next((place for place, word in enumerate(args) if word in self.commands), len(args))
        return super().parse_args(ctx, [*_spelt(self, args[:own]), *args[own:]])

    def get_help(self, ctx: Any) -> str:
        return page(self, ctx)


class App(typer.Typer):
    """`typer.Typer` of such commands. `cls`: another class of group."""

    def __init__(self, *, cls: type[Group] = Group, completion: bool = False) -> None:
        super().__init__(
            cls=cls,
            no_args_is_help=True,
            add_completion=completion,
            rich_markup_mode=None,
            context_settings={"help_option_names": ["-h", "--help"]},
        )

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        return super().command(name, cls=Command, **options)


def _spelt(command: Any, arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, options by the names that `command` declares, with a value behind those that stand alone."""
    options = [one for one in command.params if one.param_type_name == "option"]
    known = {name: one for one in options for name in (*one.opts, *one.secondary_opts)}
    for place, argument in enumerate(arguments):
        if argument == "--":
            yield from arguments[place:]
            return
        name, equals, value = argument.partition("=")
        if name[:2] == "--" and name not in known:
            name = same_option(name, known) or name
        yield name + equals + value
        following = arguments[place + 1 : place + 2]
        takes = name in _ALONE and name in known and not known[name].is_flag
        if takes and not equals and all(word.startswith("--") for word in following):
            yield _ALONE[name]


def page(command: Any, ctx: Any) -> str:
    """The help of a command as text: usage, what it does, options in parts, commands, examples."""
    width = max(40, min(shutil.get_terminal_size().columns, _WIDEST))
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    told = [text for text in paragraphs if not text.startswith("\b")]
    examples = [
        re.sub(r"^toolkit\b", PROJECT, line) if ctx.command_path.partition(" ")[0] == PROJECT else line
        for text in paragraphs
        if text.startswith("\b")
        for line in text.splitlines()[1:]
    ]
    arguments = [one for one in command.params if one.param_type_name == "argument" and not one.hidden]
    usage = [f"Usage: {ctx.command_path}", "[OPTIONS]", *map(_in_usage, arguments)]
    usage += ["COMMAND [ARGS]..."] if isinstance(command, Group) else []
    blocks = [_wrapped(" ".join(usage), width, " " * 7)]
    blocks += [_wrapped(" ".join(text.split()), width) for text in told if text]
    parts: dict[str, list[tuple[str, str]]] = {}
    if arguments:
        parts["Arguments"] = [(_value(one, ctx), _described(one)) for one in arguments]
    for option in command.get_params(ctx):
        if option.param_type_name == "option" and not option.hidden:
            part = getattr(option, "rich_help_panel", None) or "Options"
            parts.setdefault(part, []).append((_named(option, ctx), _described(option)))
    if isinstance(command, Group):
        inner = [(name, command.get_command(ctx, name)) for name in command.list_commands(ctx)]
        parts["Commands"] = [(name, _first_sentence(one)) for name, one in inner if one is not None and not one.hidden]
    blocks += ["\n".join([f"{title}:", *_rows(rows, width)]) for title, rows in parts.items()]
    if examples:
        blocks.append("\n".join(["Examples:", *(f"  {line}".rstrip() for line in examples)]))
    return "\n\n".join(blocks)


def metavar(parameter: Any, ctx: Any) -> str:
    """The word for what an option or an argument takes; empty for a switch."""
    if getattr(parameter, "is_flag", False):
        return ""
    if parameter.metavar:
        return str(parameter.metavar)
    if parameter.name in _VALUES:
        return _VALUES[parameter.name]
    low, high = (getattr(parameter, end, None) for end in ("min", "max"))
    if low is not None and high is not None and high - low < 5 and isinstance(low, int):
        return "|".join(map(str, range(low, high + 1)))
    record = parameter.get_help_record(ctx)[0]  # "--loss <chunked|plain>", "--steps <int range>"
    kind = record.rpartition("<" if "<" in record else " ")[2].strip("<>[]")
    return kind if "|" in kind else "N" if "int" in kind.lower() else "X" if "float" in kind.lower() else "TEXT"


def _value(argument: Any, ctx: Any) -> str:
    return metavar(argument, ctx).strip("[]")


def _in_usage(argument: Any) -> str:
    word = _value(argument, None)
    return word if argument.required else f"[{word}]"


def _named(option: Any, ctx: Any) -> str:
    names = sorted((*option.opts, *option.secondary_opts), key=lambda name: name[:2] == "--")
    return " ".join(filter(None, [", ".join(names), metavar(option, ctx)]))


def _described(parameter: Any) -> str:
    text = " ".join((parameter.help or "").split())
    default = parameter.default
    if parameter.required:
        return f"{text} (required)"
    silent = default is None or default is False or default in ([], ()) or callable(default)
    if silent or not parameter.show_default or "(default:" in text:
        return text
    return f"{text} (default: {getattr(default, 'value', default)})".strip()


def _first_sentence(command: Any) -> str:
    first = inspect.cleandoc(command.short_help or command.help or "").split("\n\n")[0]
    return " ".join(first.split()).removesuffix(".")


def _rows(rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    column = min(max(len(name) for name, _ in rows), _COLUMN)
    for name, text in rows:
        lines = _wrapped(text, width - column - 4).splitlines() or [""]
        if len(name) > column:
            yield f"  {name}"
        else:
            yield f"  {name:{column}}  {lines.pop(0)}".rstrip()
        yield from (f"{'':{column + 4}}{line}" for line in lines)


def _wrapped(text: str, width: int, indent: str = "") -> str:
    """Lines of at most `width` columns, of whole words: an option's name is never parted at a hyphen."""
    return TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False).fill(text)
