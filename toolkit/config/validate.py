"""Check a whole DeepSpeed JSON before anything is loaded: keys, types, names, impossible combinations."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError
from typing_extensions import is_typeddict

from toolkit.config.automatic import Shape, settle
from toolkit.config.batch import ACCUMULATION, GLOBAL, JSON_KEYS, MICRO, WORLD
from toolkit.config.deepspeed import DeepSpeedSettings
from toolkit.config.files import without_auto, without_comments
from toolkit.config.limits import Facts, check_limits
from toolkit.config.machine import check_machine, check_mesh, ranks_per_replica
from toolkit.config.optimizers import check_combination, check_optimizer, check_ready, optimizer_arguments
from toolkit.config.removed import check_removed
from toolkit.config.schedulers import check_scheduler, rates, scheduler_arguments
from toolkit.config.schema import DeepSpeedJson, deepspeed_models
from toolkit.errors import UserError
from toolkit.masking import MASK, masks
from toolkit.sentences import dotted, explain, one_line, shown

_JSON = TypeAdapter(DeepSpeedJson)

HIGHEST_USUAL_RATE = 1.0
"""Learning rates above it are remarked upon."""

_SWAPPING = ("buffer_count", "pipeline_read", "pipeline_write", "fast_init")


def validate(
    config: Mapping[str, Any], *, origin: str, world_size: int | None = None, total_steps: int | None = None
) -> None:
    """Check a DeepSpeed JSON whole.

    Args:
        config: the content. "auto", which a trainer fills in, is accepted for any value; keys that begin with "_" or
            "//" are comments.
        origin: what the sentence starts with: a file's path, a config's name.
        world_size: the number of ranks of a run on this machine. Given, the config must be complete (batch sizes that
            multiply, every argument that its optimizer and scheduler need), and this machine must have what it asks
            for. Not given, the run may still fill those in.
        total_steps: optimizer steps of the run, if it has a number for optimizers that need one.

    Raises UserError with one sentence about the first problem.
    """
    try:
        with _quiet_deepspeed():
            # What has a rule needs nobody to fill it in; any numbers do here.
            config = settle(without_comments(config), lambda: Shape(0, 0, 0), on_gpu=False, world_size=1)
            complete = world_size is not None and not _has_auto(config)
            _validate(without_auto(config), world_size, total_steps, complete=complete)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def check_keys(config: Mapping[str, Any], *, origin: str) -> None:
    """What `validate` finds without DeepSpeed, which takes seconds to import: the keys and the types of their values.

    Raises:
        UserError: as `validate`.
    """
    try:
        _JSON.validate_python(without_auto(without_comments(config)))
    except ValidationError as error:
        if error.errors(include_url=False)[0]["type"] == "extra_forbidden":
            validate(config, origin=origin)  # it knows where in DeepSpeed's sections such a key belongs
        else:
            raise UserError(f"{origin}: {explain(error, DeepSpeedJson)}") from None


def remarks(config: Mapping[str, Any]) -> list[str]:
    """Sentences about what a valid config allows and hardly anybody wants."""
    ds = DeepSpeedSettings.read(config)
    named: list[Any] = [ds.params.get("lr"), *rates(ds.scheduler_params)]
    high = [rate for rate in named if type(rate) in (int, float) and rate > HIGHEST_USUAL_RATE]
    found = [f"the learning rate is {rate:g}, far above what is usual{_meant(rate)}" for rate in dict.fromkeys(high)]
    return [*found, *_beside(ds), *_swapping(config, ds)]


def _beside(ds: DeepSpeedSettings) -> Iterator[str]:
    """What goes with the state format and is not there; formats of residuals matter only to a rule that has some."""
    made = ds.rule
    if made is None or not any(state.residual_of for rule in made.rule.variants(ds.params) for state in rule.states):
        return
    for key, value in made.rule.beside.get(str(ds.state_format), {}).items():
        own = ds.params.get(key, made.rule.model_fields[key].get_default())
        if own != value:
            yield (
                f"optimizer.params.state_format {ds.state_format!r} is made for {key} {value!r}, and {key} is {own!r}, "
                "with which updates are further from those with fp32 state."
            )


def _swapping(config: Mapping[str, Any], ds: DeepSpeedSettings) -> Iterator[str]:
    """What says how DeepSpeed swaps state, and is for its own optimizers."""
    if ds.rule is None or ds.offload_optimizer != "nvme":
        return
    section = config["zero_optimization"]["offload_optimizer"]
    place = "zero_optimization.offload_optimizer"
    given = [f"{place}.{key}" for key in _SWAPPING if key in section]
    given += ["aio"] if "aio" in config and ds.offload_param != "nvme" else []
    if given:
        yield (
            f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect: the state of {ds.optimizer} lies in "
            "files that the operating system reads and writes."
        )


def _meant(rate: float) -> str:
    """6e4 is mostly meant to be 6e-4."""
    digits, exponent = f"{rate:e}".split("e")
    return f"; was {float(digits):g}e-{int(exponent)} meant?" if 2 <= int(exponent) <= 6 else "."


def _validate(config: dict[str, Any], world_size: int | None, total_steps: int | None, *, complete: bool) -> None:
    check_removed(config)
    for path in masks(config):
        raise UserError(
            f"{path} is {MASK!r}, which the files of a run have in place of a secret; give the secret itself, or leave "
            "the section out."
        )
    try:
        _JSON.validate_python(config)
    except ValidationError as error:
        raise UserError(_explain(error, config)) from None
    models = _check_sections(config)

    ds = DeepSpeedSettings.read(config)
    facts = Facts(config, models, ds)
    if ds.optimizer is not None:
        check_optimizer(ds.optimizer, ds.params, offloaded=ds.offload_optimizer != "none")
    if ds.scheduler is not None:
        check_scheduler(
            ds.scheduler, ds.scheduler_params, optimizer=ds.optimizer, lr=ds.params.get("lr"), complete=complete
        )
    check_limits(facts)
    if ds.rule:
        check_combination(ds, accumulation=ds.batch.get(ACCUMULATION))
        if complete:
            check_ready(ds, total_steps)
    if world_size is not None:
        check_mesh(facts, world_size)
    _check_batch(facts, world_size, complete=complete)
    _check_by_deepspeed(config)
    if world_size is not None:
        check_machine(facts)


def _explain(error: ValidationError, config: Mapping[str, Any]) -> str:
    """The sentence for what the schema refuses; a key in the wrong place is told the right one."""
    first = error.errors(include_url=False)[0]
    sentence = explain(error, DeepSpeedJson)
    if first["type"] != "extra_forbidden":
        return sentence
    *parents, key = map(str, first["loc"])
    places = [place for place in _places_of(key, config) if place.split(".")[:-1] != parents]
    if not 0 < len(places) <= 3:
        return sentence
    return f"unknown key {dotted([*parents, key])!r}. Did you mean {' or '.join(map(repr, places))}?"


def _places_of(key: str, config: Mapping[str, Any]) -> list[str]:
    """The dotted paths at which a section of the JSON has a key of this name."""
    found = []
    optimizer, scheduler = config.get("optimizer", {}), config.get("scheduler", {})
    for name, section, known in (
        ("optimizer", optimizer, optimizer_arguments),
        ("scheduler", scheduler, scheduler_arguments),
    ):
        kind = section.get("type") if isinstance(section, Mapping) else None
        if isinstance(kind, str) and key in known(kind):
            found.append(f"{name}.params.{key}")
    for path, model in deepspeed_models().items():
        if any(key in (name, field.alias) for name, field in model.model_fields.items()):
            found.append(dotted([*path, key]))
    for name, hint in get_type_hints(DeepSpeedJson).items():
        if is_typeddict(hint) and key in get_type_hints(hint):
            found.append(f"{name}.{key}")
    return found


def _check_sections(config: Mapping[str, Any]) -> dict[str, BaseModel]:
    """Every section that DeepSpeed has a model for, parsed by it, by dotted path."""
    parsed: dict[str, BaseModel] = {}
    for path, model in deepspeed_models().items():
        section: Any = config
        for key in path:
            section = section.get(key, {})
        if isinstance(section, bool):  # the deprecated `zero_optimization: true`
            continue
        if not isinstance(section, Mapping):
            raise UserError(f"{dotted(path)} is {shown(section)}, but must be an object with keys.")
        try:
            parsed[dotted(path)] = model(**section)
        except ValidationError as error:
            raise UserError(explain(error, model, path)) from None
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"{dotted(path)}: {one_line(error)}") from None
    return parsed


def _check_batch(facts: Facts, world_size: int | None, *, complete: bool) -> None:
    total, micro, steps = (facts.ds.batch.get(name) for name in (GLOBAL, MICRO, ACCUMULATION))
    if complete and total is None and micro is None:
        raise UserError(f"{JSON_KEYS[GLOBAL]} and {JSON_KEYS[MICRO]} are both missing; give one of them.")
    if total is None:
        return
    replicas = None if world_size is None else world_size // ranks_per_replica(facts)
    known = {JSON_KEYS[MICRO]: micro, JSON_KEYS[ACCUMULATION]: steps, WORLD: replicas}
    factors = {name: factor for name, factor in known.items() if factor is not None}
    product = 1
    for factor in factors.values():
        product *= factor
    if total % product == 0 and (len(factors) < len(known) or total == product):
        return
    relation = "is not" if len(factors) == len(known) else "is not a multiple of"
    terms = " * ".join(f"{factor} ({name})" for name, factor in factors.items())
    raise UserError(f"{JSON_KEYS[GLOBAL]} {total} {relation} {terms} = {product}.")


def _check_by_deepspeed(config: Mapping[str, Any]) -> None:
    """Last, whatever else DeepSpeed's own config reader refuses, with the batch sizes set aside."""
    from deepspeed.runtime.config import DeepSpeedConfig

    trial = {key: value for key, value in copy.deepcopy(dict(config)).items() if key not in JSON_KEYS.values()}
    try:
        read = DeepSpeedConfig({**trial, JSON_KEYS[MICRO]: 1})
        _try_token_dropping(read.data_efficiency_config["data_routing"]["random_ltd"])
    except Exception as error:
        raise UserError(f"DeepSpeed refuses this config: {one_line(error)}") from None


def _try_token_dropping(section: Mapping[str, Any]) -> None:
    """What the engine does with `random_ltd`, whose keys nobody else looks at."""
    from deepspeed.runtime.data_pipeline.data_routing.scheduler import RandomLTDScheduler

    if section["enabled"]:
        try:
            RandomLTDScheduler({**section, "global_batch_size": 1, "micro_batch_size": 1})
        except KeyError as error:
            raise ValueError(f"data_efficiency.data_routing.random_ltd lacks {error}") from None


def _has_auto(config: Mapping[str, Any]) -> bool:
    return any(value == "auto" or (isinstance(value, Mapping) and _has_auto(value)) for value in config.values())


@contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Its remarks on a config belong to the run itself, where they come once more."""
    logger = logging.getLogger("DeepSpeed")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
