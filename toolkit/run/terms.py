"""What a resumed run takes from its checkpoint: every setting that the command line does not give."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from toolkit.config import DeepSpeedSettings
from toolkit.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch, Kept
from toolkit.records.activations import Activations, renamed
from toolkit.run.merge import WITH_WARMUP
from toolkit.run.settings import AUTO, RunSettings, check_settings, flag_of
from toolkit.sentences import value_at

# Settings that are kept unless they are given, and keys of the JSON whose `--set` counts as giving them.
KEPT: dict[str, tuple[str, ...]] = {
    "steps": (),
    "lr": ("optimizer.params.lr", "scheduler.params.warmup_max_lr", "scheduler.params.cycle_max_lr"),
    "warmup": ("scheduler.params.warmup_num_steps",),
    "eval_every": (),
    "eval_sequences": (),
    "save_every": (),
    "keep_last": (),
    "keep_every": (),
    "max_skipped": (),
    "activations": (),
    "loss": (),
    "lora": (),
    "track": (),
}

# Keys and sections of the JSON whose change is reported. Nothing that could hold a secret is among them.
_TOLD = (
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_param.device",
)
_RANKS = "ranks"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint notes of the run that saved it.

    Args:
        global_batch: sequences of a step; None where it does not say so.
        settings: values of `KEPT`.
        terms: as `terms` has them.
    """

    global_batch: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    terms: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Saved:
        """From a manifest's facts, of which older versions wrote less."""
        run = facts.get("run")
        run = run if isinstance(run, Mapping) else {}
        settings, told = renamed(run.get("settings")), renamed(run.get("terms"))
        return cls(
            _whole(facts.get("global_batch")),
            settings if isinstance(settings, Mapping) else {},
            told if isinstance(told, Mapping) else {},
        )

    @property
    def batch(self) -> Kept | None:
        """Its batch, as far as that stays."""
        return None if self.global_batch is None else Kept(self.global_batch, _whole(self.terms.get(MICRO)))


def _whole(value: Any) -> int | None:
    """`value` if it is a whole number above 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def saved_facts(settings: RunSettings, config: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """What a checkpoint notes, for `Saved.of`."""
    chosen = settings.model_dump(mode="json", include=set(KEPT))
    return {"settings": chosen, "terms": terms(settings, config, batch)}


def terms(settings: RunSettings, config: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """All that a curve depends on, and what is written, by the name that a user knows it by."""
    found: dict[str, Any] = {_RANKS: batch.world_size, MICRO: batch.micro, ACCUMULATION: batch.accumulation}
    found[GLOBAL] = batch.total
    # The rate and the warm-up are those of the JSON, into which the flags have been written.
    kept = settings.model_dump(mode="json", include=set(KEPT))
    found |= {flag_of(name): kept[name] for name in KEPT if name not in ("lr", "warmup")}
    found["--track"] = settings.tracker
    found["--compile-model"] = settings.compile_model
    found["--deterministic"] = settings.deterministic
    for path in _TOLD:
        found.update(_flat(path, value_at(config, path)))
    return found


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}", inner)
    elif value is not None:
        yield path, value


def changes(saved: Saved, now: Mapping[str, Any]) -> list[str]:
    """What differs from the run that saved the checkpoint, in words."""
    before = saved.terms or ({GLOBAL: saved.global_batch} if saved.global_batch else {})
    names = [*before, *(name for name in now if name not in before)] if saved.terms else list(before)
    return [
        f"{name} {_shown(before.get(name))}, now {_shown(now.get(name))}"
        for name in names
        if _plain(before.get(name)) != _plain(now.get(name))
    ]


def _plain(value: Any) -> Any:
    """As JSON has it, so that a tuple is a list."""
    return json.loads(json.dumps(value, default=str))


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, default=str).strip('"')


def kept_settings(settings: RunSettings, saved: Saved, config: Mapping[str, Any]) -> tuple[RunSettings, list[str]]:
    """`settings` with the checkpoint's values where the command line gives none, and what these are, by flag.

    Raises:
        UserError: the checkpoint holds a value that no run can have had.
    """
    taken = {
        name: saved.settings[name]
        for name, paths in KEPT.items()
        if saved.settings.get(name) is not None and not _typed(settings, name, paths)
    }
    if "warmup" in taken and DeepSpeedSettings.read(config).scheduler not in WITH_WARMUP:
        del taken["warmup"]
    if (
        "activations" in taken
        and Activations.read(taken["activations"]).budget is not None
        and not settings.compile_model
    ):
        del taken["activations"]  # which the compiler alone can carry out
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    open_rate = given.get("lr") == AUTO and "lr" not in taken
    if open_rate:
        del given["lr"]
    kept = check_settings(**(given | taken))
    told = ["the learning rate of the JSON, since --lr auto is for the start of a run"] if open_rate else []
    told += [f"{flag_of(name)} {_shown(value)}" for name, value in taken.items() if value != getattr(settings, name)]
    return kept, told


def _typed(settings: RunSettings, name: str, paths: tuple[str, ...]) -> bool:
    """Whether the command line gives `name`; "auto" leaves it to the run that is resumed, which has found its rate."""
    if getattr(settings, name) == AUTO:
        return False
    return name in settings.model_fields_set or any(
        f"{path}.".startswith(f"{key}.") for path in paths for key in settings.overridden()
    )
