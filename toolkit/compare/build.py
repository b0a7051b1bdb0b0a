"""The report of a comparison, from the runs that are there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.compare.data import ComparisonReport, Curve, Difference, MethodResult, SweepResult
from toolkit.compare.differences import difference, spread
from toolkit.compare.plan import Method
from toolkit.compare.runs import Cell, Runs, point_settings, read_summary
from toolkit.compare.tuning import Swept, Tuning
from toolkit.errors import UserError
from toolkit.masking import masked
from toolkit.records.sizes import counted
from toolkit.report.compare import comparable, gaps, version
from toolkit.report.data import RunReport
from toolkit.report.read import read_folder
from toolkit.report.run_report import build_run
from toolkit.report.words import listed

_PARTS = 40
"""Points of a curve: training loss is noisy from step to step."""
_MEANT_TO_DIFFER = ("learning rate", "betas", "weight decay", "warm-up", "seed", "memory")
_FACTOR = 2.0
"""Between values of a sweep: the method of measuring asks for no more."""
_SEEDS = 3


def build(runs: Runs) -> ComparisonReport:
    """The report of what has ended."""
    plan = runs.plan
    tunings = {method.name: runs.tuning(method) for method in plan.methods}
    losses = {name: runs.losses(name, tuning.point) for name, tuning in tunings.items()}
    read = {name: _read(runs, name, tuning, sorted(losses[name])) for name, tuning in tunings.items()}
    first = {name: by_seed[min(by_seed)] for name, by_seed in read.items() if by_seed}
    kind, sizes = comparable(list(first.values())) if first else (None, [])
    peaks = dict(zip(first, sizes, strict=True))
    methods = []
    for method in plan.methods:
        tuning, name = tunings[method.name], method.name
        apart = difference(losses[name], losses[plan.baseline]) if name != plan.baseline else None
        untuned = _why_untuned(method, tuning)
        cell = Cell(name, tuning.point, 0)
        methods.append(
            MethodResult(
                name=name,
                origin=method.origin,
                best=dict(tuning.point),
                tuned=tuning.tuned,
                why_untuned=untuned,
                losses=losses[name],
                mean=statistics.fmean(losses[name].values()) if losses[name] else None,
                spread=spread(losses[name]),
                difference=None
                if apart is None
                else Difference(**vars(apart), curve=_paired_curve(read[name], read[plan.baseline])),
                peak=peaks.get(name),
                peak_kind=kind if peaks.get(name) is not None else None,
                state_per_parameter=_from_summaries(runs, cell, losses[name], "state_bytes_per_parameter"),
                tokens_per_s=_from_summaries(runs, cell, losses[name], "tokens_per_s"),
                sweeps=[_sweep(swept) for swept in tuning.sweeps],
                curve=_curve([_steps(run) for run in read[name].values()]),
                runs=[str(runs.folder(Cell(name, tuning.point, seed)).relative_to(runs.out)) for seed in losses[name]],
                command=runs.shown(cell),
                config=masked(_config(method, first.get(name), runs, cell)),
            )
        )
    return ComparisonReport(
        title=f"{len(methods)} method{'s' if len(methods) > 1 else ''} on {plan.settings['model']}",
        headline=_headline(methods, plan.baseline),
        setting=_setting(runs, first),
        notes=_notes(runs, methods, tunings, list(first.values())),
        baseline=plan.baseline,
        methods=methods,
        settings=masked(plan.settings),
        ranks=plan.ranks,
        leanstate=version(),
    )


def _read(runs: Runs, name: str, tuning: Tuning, seeds: Sequence[int]) -> dict[int, RunReport]:
    found = {}
    for seed in seeds:
        try:
            found[seed] = build_run(read_folder(runs.folder(Cell(name, tuning.point, seed))), name)
        except UserError:  # removed meanwhile
            continue
    return found


def _why_untuned(method: Method, tuning: Tuning) -> str | None:
    if not method.sweeps:
        return "nothing is swept"
    for swept in tuning.sweeps:
        where = {
            "one value": f"the sweep of {swept.key} has one value",
            "lowest": f"the best {swept.key} is the lowest that was tried",
            "highest": f"the best {swept.key} is the highest that was tried",
            "not finished": f"the sweep of {swept.key} is not finished",
            "diverged": f"every run of the sweep of {swept.key} diverged",
        }.get(swept.verdict)
        if where is not None:
            return where
    return None


def _sweep(swept: Swept) -> SweepResult:
    return SweepResult(
        key=swept.key,
        losses={
            f"{value:g}": loss if loss is not None and math.isfinite(loss) else None
            for value, loss in swept.losses.items()
        },
        diverged=[f"{value:g}" for value, loss in swept.losses.items() if loss is not None and math.isinf(loss)],
        verdict=swept.verdict,
        factor=swept.step,
    )


def _from_summaries(runs: Runs, cell: Cell, seeds: Mapping[int, float], key: str) -> float | None:
    found = [(read_summary(runs.folder(Cell(cell.method, cell.point, seed))) or {}).get(key) for seed in seeds]
    numbers = [float(value) for value in found if isinstance(value, int | float)]
    return statistics.fmean(numbers) if numbers else None


def _config(method: Method, run: RunReport | None, runs: Runs, cell: Cell) -> dict[str, Any]:
    """As the run used it; before there is one, as it is asked for."""
    from toolkit.config import apply_overrides, load_config
    from toolkit.records.run import CONFIG

    used = runs.folder(cell) / CONFIG
    if run is not None and used.is_file():
        return load_config(used)
    return apply_overrides(method.config, point_settings(cell.point)[1])


def _steps(run: RunReport) -> dict[int, float]:
    if run.training is None:
        return {}
    curve = run.training.curve
    return {step: loss for step, loss in zip(curve.steps, curve.loss, strict=True) if loss is not None}


def _curve(losses: Sequence[Mapping[int, float]]) -> Curve | None:
    """The mean of all in each of `_PARTS` parts of the steps."""
    last = max((max(by_step) for by_step in losses if by_step), default=0)
    if not last:
        return None
    size = max(1, math.ceil(last / _PARTS))
    parts: dict[int, list[float]] = {}
    for by_step in losses:
        for step, loss in by_step.items():
            parts.setdefault(-(-step // size) * size, []).append(loss)
    return Curve(
        steps=[min(end, last) for end in sorted(parts)], loss=[statistics.fmean(parts[end]) for end in sorted(parts)]
    )


def _paired_curve(mine: Mapping[int, RunReport], base: Mapping[int, RunReport]) -> Curve | None:
    pairs = [(_steps(run), _steps(base[seed])) for seed, run in mine.items() if seed in base]
    return _curve([{step: loss - other[step] for step, loss in one.items() if step in other} for one, other in pairs])


def _headline(methods: Sequence[MethodResult], baseline: str) -> str:
    known = sorted((method.mean, method.name) for method in methods if method.mean is not None)
    if not known:
        return "No run has ended yet."
    best = next(method for method in methods if method.name == known[0][1])
    if len(known) == 1 < len(methods):
        return f"{best.name} alone has a result so far, a validation loss of {best.mean:.4f}."
    sentence = f"{best.name} has the lowest validation loss, {best.mean:.4f}"
    if best.difference is not None:
        error = best.difference.standard_error
        sentence += f", {-best.difference.mean:.4f}{'' if error is None else f' ± {error:.4f}'} below {baseline}"
    if best.why_untuned:
        sentence += f"; but {best.why_untuned}"
    return f"{sentence}."


def _setting(runs: Runs, first: Mapping[str, RunReport]) -> str:
    plan, known = runs.plan, next(iter(first.values()), None)
    settings = plan.settings
    facts = known.facts if known is not None else None
    parameters = f" ({facts.parameters:,} parameters)" if facts is not None and facts.parameters else ""
    batch = f" of {counted(facts.global_batch, 'sequence')}" if facts is not None and facts.global_batch else ""
    device = f" ({facts.device})" if facts is not None and facts.device else ""
    held_out = settings.get("val_data") or f"a part held out of {settings['data']}"
    return (
        f"Every run: {settings['model']}{parameters}, {counted(settings['steps'], 'step')}{batch} of "
        f"{counted(settings['seq_len'], 'token')} of {settings['data']}, {counted(plan.ranks, 'rank')}{device}; the "
        f"loss is that after the last step, on at most {counted(settings['eval_sequences'], 'sequence')} of {held_out}."
    )


def _notes(
    runs: Runs, methods: Sequence[MethodResult], tunings: Mapping[str, Tuning], first: Sequence[RunReport]
) -> list[str]:
    notes = [f"{method.name} is untuned: {method.why_untuned}." for method in methods if method.why_untuned]
    for method in methods:
        coarse = [sweep for sweep in method.sweeps if sweep.factor is not None and sweep.factor > _FACTOR * 1.01]
        notes += [
            f"The sweep of {method.name} over {sweep.key} is coarse: a factor of {sweep.factor:.2g} from the best "
            "value to its neighbour."
            for sweep in coarse
        ]
    few = [method.name for method in methods if len(method.losses) < _SEEDS]
    if few:
        notes.append(f"Fewer than {_SEEDS} seeds: {listed(few)}.")
    left = sum(len(tuning.wanted) for tuning in tunings.values())
    if left:
        notes.append(f"Not finished: at least {left} more run{'s' if left > 1 else ''}.")
    return notes + [gap for gap in gaps(first) if not any(gap.startswith(f"Different {x}") for x in _MEANT_TO_DIFFER)]
