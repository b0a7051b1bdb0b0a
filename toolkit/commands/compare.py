"""`toolkit compare`: methods side by side, swept and over several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.errors import UserError, nearest
from toolkit.plugins import import_plugins
from toolkit.printable import echo
from toolkit.usage import same_option

if TYPE_CHECKING:
    from toolkit.compare.plan import Plan
    from toolkit.compare.report import Written
    from toolkit.run.settings import RunSettings

_OWN = {
    "config": "--methods NAME=CONFIG",
    "lr": "--sweep lr=VALUE,VALUE",
    "seed": "--seeds",
    "run_dir": "--out",
    "resume": "--out, whose runs resume by themselves",
    "convert_state": "another --out",
}
"""Options of launch/train.py that a comparison sets itself, and what to give instead."""
_OF_THE_PLAN = ("sweep", "seeds", "extend", "baseline", "ranks", "zero_stage")
"""Options that are kept in the plan, with the methods."""
_EVAL_TOKENS = 65_536
"""Of a validation, at least."""
_FAILED = 1


def compare(
    ctx: typer.Context,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME=CONFIG,...|FILE",
            help="Shipped configs, rules, classes by import path, NAME=a config; or a JSON or TOML file; repeatable.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,...", help="Values to try: of lr, warmup or a key of the JSON; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds at the best values; the sweep is made with the first.")] = 3,
    extend: Annotated[
        int, typer.Option(min=0, help="Values at most to add to a sweep whose best value is at its end.")
    ] = 4,
    baseline: Annotated[
        str | None, typer.Option(help="The method that others are compared with. (default: the first)")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of each run.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    zero_stage: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage of methods that do not name theirs.")] = 2,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so many, as Ctrl-C does. (default: never)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The comparison's folder; one that exists is continued.")] = None,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Leave the last checkpoint of runs that have ended.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report", help="Write the report of what is there; run nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON; what happens goes to stderr.")
    ] = False,
) -> None:
    """Train with several methods, each swept and over several seeds, and report them side by side.

    All other options are those of `toolkit train`, and every run gets them.

    \b
    toolkit compare --methods amcs,adamw --sweep lr=5e-4,1e-3,2e-3 --steps 400
    toolkit compare --methods amcs,mine=mine.json --seeds 5 --jobs 2
    toolkit compare --out runs/compare-qwen3-tiny --report --json
    """
    from toolkit.compare.drive import Driver, locked
    from toolkit.compare.plan import KEPT, extended, load, save
    from toolkit.compare.report import write
    from toolkit.compare.runs import Runs
    from toolkit.run.ranks import check_room
    from toolkit.run.stopping import INTERRUPTED

    settings = _settings(ctx.args)
    folder = out or Path("runs") / f"compare-{Path(settings.model).name}"
    old = load(folder)
    given = [name for name in _OF_THE_PLAN if str(ctx.get_parameter_source(name)).endswith("COMMANDLINE")]
    if methods or old is None:
        new = _plan(settings, methods or (), sweep or (), seeds, extend, baseline, ranks, zero_stage)
        plan = extended(old, new, folder, kept=[name for name in KEPT if name not in given])
        _check_baseline(plan)
    else:
        named = [f"--{given[0].replace('_', '-')}"] if given else list(ctx.args[:1])
        if named:
            raise UserError(f"{folder} holds a comparison; to change it by {named[0]}, give --methods too.")
        plan = old
    if report_only:
        if old is None:
            raise UserError(f"{folder} holds no comparison to report.")
        _show(write(Runs(plan, folder)), as_json)
        return
    if minutes is not None and math.isnan(minutes):
        raise UserError("--minutes is nan, but must be a number from 0 on.")
    check_room(plan.ranks * jobs, options="--ranks times --jobs" if jobs > 1 else "--ranks")
    with locked(folder):
        save(plan, folder)
        runs = Runs(plan, folder)
        say = partial(echo, err=True) if as_json else echo
        driver = Driver(
            runs,
            jobs=jobs,
            keep_checkpoints=keep_checkpoints,
            say=say,
            ended=lambda: write(runs),
            minutes=minutes,
        )
        finished = driver.drive()
        _show(write(runs), as_json)
    if not finished:
        say("stopped; the same command resumes.")
        raise typer.Exit(INTERRUPTED)
    if driver.failures:
        raise typer.Exit(_FAILED)


def _show(report: Written, as_json: bool) -> None:
    if as_json:
        typer.echo(next(path for path in report.files if path.suffix == ".json").read_text(encoding="utf-8"), nl=False)
        return
    echo(report.headline)
    for note in report.notes:
        echo(f"note: {note}")
    for path in report.files:
        echo(f"written: {path}")


def _settings(arguments: Sequence[str]) -> RunSettings:
    """The options that are launch/train.py's.

    Raises:
        UserError: one is unknown there, or is set by the comparison.
    """
    from toolkit.run.settings import RunSettings, flag_of, parse

    known = [flag_of(name) for name in RunSettings.model_fields]
    own = ["--methods", "--sweep", "--seeds", "--extend", "--baseline", "--ranks", "--jobs", "--zero-stage"]
    own += ["--minutes", "--out"]
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    spelt = {flag: flag.replace("_", "-").replace("--no-", "--") for flag in flags}
    unknown = next(
        (
            flag
            for flag in flags
            if same_option(flag, known) is None and not any(option.startswith(spelt[flag]) for option in known)
        ),
        "",
    )
    if unknown and (hint := nearest(unknown, [*own, *known])):
        raise UserError(f"there is no option {unknown}.{hint}")
    settings = parse(arguments)
    if settings is None:
        raise typer.Exit
    for name, instead in _OWN.items():
        if name in settings.model_fields_set:
            raise UserError(f"{flag_of(name)} is set by the comparison; give {instead}.")
    return settings


def _plan(
    settings: RunSettings,
    methods: Sequence[str],
    sweeps: Sequence[str],
    seeds: int,
    extend: int,
    baseline: str | None,
    ranks: int,
    stage: int,
) -> Plan:
    from toolkit.compare.methods import read_methods, read_sweep
    from toolkit.compare.plan import Plan

    if not methods:
        raise UserError("--methods is missing: give what to compare, as in --methods amcs,adamw.")
    import_plugins(settings.plugins)
    shared = [read_sweep(text) for text in sweeps]
    found = read_methods(methods, shared, stage, settings.overrides)
    given = settings.model_dump(mode="json", include=settings.model_fields_set)
    usual = {
        "model": settings.model,
        "data": settings.data,
        "steps": settings.steps,
        "seq_len": settings.seq_len,
        "eval_every": settings.steps,  # the loss is compared at the end of the schedule only
        "eval_sequences": max(32, _EVAL_TOKENS // settings.seq_len),
        "keep_last": 1,
        "memory_profile": "full",
    }
    plan = Plan(
        settings=usual | given,
        ranks=ranks,
        seeds=seeds,
        extend=extend,
        baseline=baseline or found[0].name,
        methods=found,
    )
    _check(plan)
    return plan


def _check_baseline(plan: Plan) -> None:
    names = [method.name for method in plan.methods]
    if plan.baseline not in names:
        hint = nearest(plan.baseline, names)
        raise UserError(f"--baseline {plan.baseline!r} is none of the methods {', '.join(names)}.{hint}")


def _check(plan: Plan) -> None:
    """Validate every method's JSON as its runs will. Raises UserError, which names the method."""
    from toolkit.compare.runs import point_settings
    from toolkit.config import apply_overrides, validate
    from toolkit.run.merge import merge_flags
    from toolkit.run.settings import check_settings

    for method in plan.methods:
        for point in (
            [()] if not method.sweeps else [((one.key, value),) for one in method.sweeps for value in one.values]
        ):
            flags, assignments = point_settings(point)
            settings = check_settings(**(plan.settings | flags | {"overrides": assignments}))
            merged, _, _ = merge_flags(apply_overrides(method.config, assignments), settings, plan.ranks)
            validate(merged, origin=method.name, world_size=plan.ranks, total_steps=settings.steps)
