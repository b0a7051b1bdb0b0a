"""What all commands have in common: whole words in help, examples that are right, options by every usual name."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import toolkit
from toolkit import cli, usage
from toolkit.command import Group, metavar

ROOT = Path(__file__).resolve().parents[2]


def commands(command: Any = None, ctx: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Every command with its path and context."""
    if command is None:
        command = typer.main.get_command(cli.app)
        ctx = command.make_context("toolkit", [], resilient_parsing=True)
    yield ctx.command_path, command, ctx
    for name in command.list_commands(ctx) if isinstance(command, Group) else ():
        inner = command.get_command(ctx, name)
        yield from commands(inner, inner.make_context(name, [], parent=ctx, resilient_parsing=True))


ALL = list(commands())
every = pytest.mark.parametrize(("command", "ctx"), [pytest.param(*rest, id=path) for path, *rest in ALL])


def help_of(command: Any, ctx: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return str(command.get_help(ctx))


@every
@pytest.mark.parametrize("columns", [80, 200])
def test_no_word_of_help_is_cut(command: Any, ctx: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = help_of(command, ctx, columns, monkeypatch)
    assert max(map(len, shown.splitlines())) <= columns
    words = shown.split()
    assert not any("\N{HORIZONTAL ELLIPSIS}" in word or re.search(r"[a-z]\.\.\.$", word) for word in words)
    names = {name for option in command.get_params(ctx) if not option.hidden for name in option.opts if name[0] == "-"}
    assert names <= {word.strip(",") for word in words} and {"-h,", "--help"} <= set(words)
    # The page holds the words of one whose lines nothing breaks.
    monkeypatch.setattr("toolkit.command._WIDEST", 100_000)
    assert help_of(command, ctx, 100_000, monkeypatch).split() == words


@every
def test_a_part_of_the_help_is_there_for_several_options(command: Any, ctx: Any) -> None:
    """An option that commands share does not bring the part along that it stands in elsewhere."""
    options = [one for one in command.get_params(ctx) if one.param_type_name == "option" and not one.hidden]
    parts = Counter(getattr(one, "rich_help_panel", None) for one in options)
    assert all(count > 1 for part, count in parts.items() if part is not None)


@every
def test_values_are_named_for_people(command: Any, ctx: Any) -> None:
    for one in command.params:
        if not getattr(one, "is_flag", False):
            word = metavar(one, ctx)
            assert word not in ("", "TEXT") and not re.search(r"[<>]|\bint|\bstr|\blist", word), one.name


@every
def test_help_ends_with_examples_that_the_command_takes(
    command: Any, ctx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = help_of(command, ctx, 80, monkeypatch).split("\nExamples:\n")[1].splitlines()
    assert examples
    for line in examples:
        words = shlex.split(line.partition(" > ")[0].partition(" < ")[0])
        path = ctx.command_path.split()
        assert words[: len(path)] == path
        if not isinstance(command, Group):
            parsed = command.make_context(command.name, words[len(path) :], parent=ctx.parent)
            assert not parsed.args or command.name == "compare"


def test_commands_come_in_the_order_of_a_users_day() -> None:
    assert [path for path, *_ in ALL if path.count(" ") == 1] == [f"toolkit {name}" for name in cli.ORDER]


@every
def test_a_command_has_one_option_of_a_kind(command: Any, ctx: Any) -> None:
    rows = [usage.row_of(option.opts[0]) for option in command.params if option.param_type_name == "option"]
    assert len({row[0] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("command", "line", "expected"),
    [
        ("train", "--per_device_train_batch_size 3", {"micro_batch": 3}),
        ("train", "--train_micro_batch_size_per_gpu=3", {"micro_batch": 3}),
        ("train", "--gradient-accumulation-steps 2 --learning_rate 1e-3", {"grad_accum": 2, "lr": 1e-3}),
        ("train", "--num_gpus 2 --max_steps 7", {"num_gpus": 2, "steps": 7}),
        ("train", "--output_dir a --resume_from_checkpoint b", {"run_dir": Path("a"), "resume": "b"}),
        ("train", "--from_pretrained --model m", {"from_checkpoint": True, "model": "m"}),
        ("train", "--resume --steps 3", {"resume": "auto", "steps": 3}),
        ("train", "--resume", {"resume": "auto"}),
        ("train", "--deepspeed-config soam_zero3 --master_port 5", {"config": "soam_zero3", "master_port": 5}),
        ("estimate", "--ranks 4 --num_nodes 2 --block_size 9", {"gpus": 4, "nodes": 2, "seq_len": 9}),
        ("plan", "--model_name_or_path m --vram 8GB", {"model": "m", "gpu_memory": "8GB"}),
        ("report", "a --output x.md", {"out": Path("x.md")}),
        ("export", "a --out b", {"to": Path("b")}),
        ("sample", "a b --max_new_tokens 3 --num_return_sequences 2", {"tokens": 3, "count": 2}),
        ("bench train", "--zero_stage 3 --num-gpus 2 --json", {"zero_stage": 3, "ranks": 2, "json_to": "-"}),
        ("bench step", "--json a.json", {"json_to": "a.json"}),
        ("fits", "--json", {"as_json": True}),
    ],
)
def test_options_may_have_the_names_of_other_programs(command: str, line: str, expected: dict[str, Any]) -> None:
    [(found, ctx)] = [rest for path, *rest in ALL if path == f"toolkit {command}"]
    params = found.make_context(found.name, line.split(), parent=ctx.parent).params
    assert {name: float(params[name]) if name == "lr" else params[name] for name in expected} == expected


def test_the_trainers_option_for_a_deepspeed_json_is_explained() -> None:
    [(found, ctx)] = [rest for path, *rest in ALL if path == "toolkit train"]
    with pytest.raises(usage.USAGE_ERROR) as caught:
        found.make_context(found.name, ["--deepspeed", "a.json"], parent=ctx.parent)
    assert "the DeepSpeed JSON is given with --config" in usage.sentence(caught.value)


def complete(words: str) -> list[str]:
    """What bash would be offered behind `words`; the process that finds it must not load torch."""
    script = (
        "import sys, atexit; from toolkit.cli import main; sys.argv = ['toolkit']\n"
        "atexit.register(lambda: print(*[m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules]))\n"
        "main()"
    )
    variables = {"_TOOLKIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    line = [sys.executable, "-c", script]
    run = subprocess.run(line, env=os.environ | variables, capture_output=True, text=True, check=False)
    *found, loaded = run.stdout.split("\n")[:-1]
    assert loaded == "", run.stderr
    return found


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("toolkit ex", {"export"}),
        ("toolkit train --config soam_zero3", {"soam_zero3", "soam_zero3_offload"}),
        ("toolkit estimate --model qwen3-ti", {"qwen3-tiny"}),
    ],
)
def test_the_shell_completes_commands_configs_and_models(words: str, offered: set[str]) -> None:
    assert set(complete(words)) == offered


def test_who_types_leanstate_reads_it_in_help(monkeypatch: pytest.MonkeyPatch) -> None:
    group = typer.main.get_command(cli.app)
    ctx = group.make_context("leanstate", [], resilient_parsing=True)
    inner = group.get_command(ctx, "fits")  # type: ignore[attr-defined]
    shown = help_of(inner, inner.make_context("fits", [], parent=ctx, resilient_parsing=True), 80, monkeypatch)
    assert "  leanstate fits --gpu-memory" in shown and "\n  toolkit" not in shown + help_of(
        group, ctx, 80, monkeypatch
    )


def test_leanstate_is_toolkit() -> None:
    code = (
        "import importlib.util as u, sys\n"
        f"spec = u.spec_from_file_location('leanstate', {str(ROOT / 'toolkit' / 'leanstate.py')!r})\n"
        "spec.loader.exec_module(u.module_from_spec(spec))\n"
        "import leanstate, toolkit\n"
        "from leanstate.optim import AMCS\n"
        "import leanstate.optim.rules.amcs, toolkit.optim\n"
        "assert leanstate is toolkit and leanstate.optim is toolkit.optim and AMCS is toolkit.optim.AMCS\n"
        "assert toolkit.optim.__spec__.name == 'toolkit.optim' and AMCS.__module__.startswith('toolkit.')\n"
        "try:\n    import leanstate.absent\nexcept ModuleNotFoundError as error: print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "toolkit.absent" in shown


def test_dir_shows_what_the_package_offers() -> None:
    assert dir(toolkit) == ["__version__", "initialize", "memory", "optim", "register"]
    assert all(importlib.util.find_spec(f"toolkit.{name}") for name in ("memory", "optim"))
