"""What was trained and how, from a run's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from toolkit.records.memory import Measurement, Prediction, Setup
from toolkit.report.data import RunFacts
from toolkit.report.read import Folder, RunFile
from toolkit.sentences import value_at


def facts_of(folder: Folder) -> RunFacts:
    """From run.json and the DeepSpeed JSON in it, with the defaults that the memory records know."""
    run = folder.run or RunFile()
    settings, config = run.settings, run.ds_config
    parameters = value_at(config, "optimizer.params")
    state_format, weights = value_at(parameters, "state_format"), value_at(parameters, "weights")
    data = f"{settings.data} ({settings.data_subset})" if settings.data_subset else settings.data
    facts = RunFacts(
        model=settings.model,
        parameters=run.parameters,
        optimizer=_text(value_at(config, "optimizer.type")),
        state_format=_text(state_format),
        weights=_text(weights),
        stage=_number(value_at(config, "zero_optimization.stage")),
        world_size=run.world_size,
        micro_batch=run.micro_batch,
        gradient_accumulation=run.gradient_accumulation,
        global_batch=run.global_batch,
        seq_len=settings.seq_len,
        **_schedule(config),
        steps=_asked(folder, settings.steps),
        activations=settings.activations,
        loss=settings.loss,
        data=data,
        tokenizer=settings.tokenizer,
        seed=settings.seed,
        device=run.device,
        started=run.started,
        versions=run.versions,
    )
    setup = _setup(folder)
    if setup is None:
        return facts
    # The records know the defaults that were resolved, run.json the words that the user chose.
    resolved = {name: value for name, value in setup if name in RunFacts.model_fields}
    known = {name: value for name, value in facts if value is not None and name in ("model", "device")}
    return facts.model_copy(update=resolved | known)


def _asked(folder: Folder, at_first: int | None) -> int | None:
    """Steps that the run was to make when it was last resumed."""
    changes = [_STEPS.fullmatch(words) for line in folder.steps for words in line.changed]
    return next((int(found[1]) for found in reversed(changes) if found), at_first)


_STEPS = re.compile(r"--steps \d+, now (\d{1,18})", re.ASCII)
"""As `toolkit.run.terms.changes` has it."""

# Where a scheduler keeps the peak that it sets, over the optimizer's own rate.
_PEAKS = ("warmup_max_lr", "cycle_max_lr")


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how fast weights move, as the JSON has it."""
    params, scheduler = value_at(config, "optimizer.params"), value_at(config, "scheduler.params")
    rates = [value_at(scheduler, name) for name in _PEAKS] + [value_at(params, "lr")]
    betas = value_at(params, "betas")
    plain = isinstance(betas, list) and all(_real(beta) is not None for beta in betas)
    return {
        "learning_rate": next((_real(rate) for rate in rates if _real(rate) is not None), None),
        "betas": betas if plain else None,
        "weight_decay": _real(value_at(params, "weight_decay")),
        "clipping": _real(value_at(config, "gradient_clipping")),
        "scheduler": _text(value_at(config, "scheduler.type")),
        "warmup": _number(value_at(scheduler, "warmup_num_steps")),
    }


def _real(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _setup(folder: Folder) -> Setup | None:
    records: list[Measurement | Prediction | None] = [*folder.measured.values(), folder.predicted]
    records += [explanation.record for explanation in folder.out_of_memory]  # type: ignore[misc]
    return next((record.setup for record in records if record is not None and record.setup is not None), None)


def _text(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {json.dumps(item).strip(chr(34))}" for key, item in value.items())
    return None if value is None else str(value)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def check_setups(folder: Folder) -> None:
    """A prediction of something else than what was measured would make every error in the report meaningless."""
    if folder.predicted is None or not folder.measured:
        return
    measured = next(iter(folder.measured.values())).setup
    for name, predicted in folder.predicted.setup:
        if predicted != (value := getattr(measured, name)):
            folder.note(
                "prediction",
                f"The prediction is of another setup than the measurement: {name} {predicted} there, {value} here.",
            )
