"""Which shipped configuration, state format and micro-batch to train a model with on given GPUs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from toolkit.config import DeepSpeedSettings, load_config, shipped_configs
from toolkit.errors import UserError
from toolkit.estimate.predict import (
    Case,
    Estimator,
    Simulated,
    assumed_context,
    offered,
    offered_activations,
    with_section,
)
from toolkit.optim import RECOMMENDED, RULES, find_rule
from toolkit.records.activations import Activations
from toolkit.records.lora import LoRA
from toolkit.state.layout import LEAN

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
ANY = "any"
DEFAULT_FORMAT = "8bit"

FORMATS: dict[str, dict[str, Any]] = {
    "8bit, bf16+8": {"state_format": "8bit", "weights": "bf16+8"},
    "8bit, bf16+8, released": {"state_format": "8bit", "weights": "bf16+8", "release_gradients": True},
    "compact, bf16+4": {"state_format": "compact", "weights": "bf16+4"},
    "compact, bf16+4, released": {"state_format": "compact", "weights": "bf16+4", "release_gradients": True},
    "minimal, bf16+4": {"state_format": "minimal", "weights": "bf16+4"},
    "lean, bf16": {"state_format": LEAN, "weights": "bf16"},
    "lean, bf16, released": {"state_format": LEAN, "weights": "bf16", "release_gradients": True},
}
"""What is tried for this package's rules, in order of preference."""


def formats_of(optimizer: str, wanted: str = ANY) -> dict[str, dict[str, Any]]:
    """Those of FORMATS that are offered for an optimizer: the leanest where its price in loss has been measured.

    Raises UserError where that one is `wanted`, and is not offered.
    """
    if find_rule(optimizer) is None:
        return {"fp32": {}}
    if not offered(optimizer, wanted):
        names = ", ".join(name for name, one in RULES.items() if LEAN in one.rule.loss_price)
        raise UserError(
            f"--state-format is {LEAN!r}, but its price in loss is not measured for {optimizer}, only for {names}. "
            f"A config can have it (optimizer.params.state_format={LEAN}), and `toolkit estimate` says what it needs."
        )
    return {state: params for state, params in FORMATS.items() if offered(optimizer, params["state_format"])}


# How much longer a token takes than without, for ranking only: assumed, not measured.
_CHECKPOINT = 4 / 3  # one more forward pass
_TILED = 1.05  # sums of weight gradients that go to memory and back
_OFFLOADED_ACTIVATIONS = 1.1  # copies beside the computation, which share its memory's bandwidth
_STAGE = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.15}
_OFFLOAD = {(): 1.0, ("optimizer",): 1.6, ("optimizer", "param"): 3.0}
_FORMAT = 0.01  # for each further one of FORMATS
_OVERHEAD_TOKENS = 1024  # of a pass that take as long as its launches and communication


@dataclass(frozen=True)
class Candidate:
    """One way of training: `micro_batch` is the largest that fits, or 1 where none does."""

    config: str
    state: str
    activations: Activations
    micro_batch: int
    needs: int
    """Bytes of the device at the peak, the context included."""
    fits: bool
    """On the device and, with what is offloaded, on the host."""
    host: int
    """Bytes of host memory of one machine, all its ranks together."""
    cost: float
    """Assumed time of a token against that of the plainest way."""
    state_format: str
    asked: bool
    """Whether its state format is the one that was asked for."""
    host_fits: bool
    holds_most: str
    """The category that takes most at the peak."""
    json: Mapping[str, Any]


def recommend(
    model: str,
    *,
    gpu_memory: int,
    world_size: int,
    seq_len: int,
    optimizer: str,
    device: str = "cuda",
    loss: str | None = None,
    lora: LoRA | None = None,
    conversations: bool = False,
    state_format: str = DEFAULT_FORMAT,
    host_memory: int,
    ranks_per_machine: int,
) -> list[Candidate]:
    """All candidates: first what fits in the state format asked for, the fastest of them first, then what else fits.

    Args:
        model: a preset or a folder with a config.json.
        gpu_memory: bytes of one device.
        optimizer: of the shipped configurations to try; for ways of sharding without one, a rule is tried in the
            recommended optimizer's.
        lora, conversations: as of `Case`.
        state_format: "8bit", "compact", "minimal", "lean", or "any" of them; what is no rule has its own.
        host_memory: bytes of one machine, which what is offloaded by its `ranks_per_machine` must fit into.

    Raises:
        UserError: as `Estimator.predict`.
    """
    estimator = Estimator(several=True)
    found: list[Candidate] = []
    choices = offered_activations(model, device, lora)
    plain = Case(model, {}, world_size, 1, seq_len, device=device, loss=loss, lora=lora, conversations=conversations)
    for name, state, case in _cases(plain, optimizer, state_format):
        tried: list[Candidate] = []
        for kept in choices:
            slower = kept.tiled or kept.offload  # for what does not fit otherwise
            if slower and any(one.fits for one in tried):
                break
            changed = replace(case, activations=kept)
            tried.append(
                _fit(estimator, changed, gpu_memory, name, state, state_format, host_memory, ranks_per_machine)
            )
        found += tried

    def order(one: Candidate) -> tuple[Any, ...]:
        # Where ranks do not matter stages 1 and 2 are the same: the usual choice comes first.
        return not one.fits, one.fits and not one.asked, one.cost if one.fits else one.needs, "zero2" not in one.config

    return sorted(found, key=order)


def _cases(plain: Case, optimizer: str, wanted: str) -> Iterator[tuple[str, str, Case]]:
    formats = formats_of(optimizer, wanted)
    for name, base in _bases(optimizer).items():
        ds = DeepSpeedSettings.read(base)
        for state, params in formats.items():
            if params.get("release_gradients") and ds.waits_for:
                continue
            config = with_section(base, ["optimizer", "params"], params)
            yield name, state, replace(plain, config=config)


def _bases(optimizer: str) -> dict[str, dict[str, Any]]:
    """The JSONs to try, by the name of the shipped configuration that each is or was made from."""
    rule = find_rule(optimizer)
    shipped = {name: one for name, one in shipped_configs().items() if one.state_format != LEAN}
    found = {name: load_config(name) for name, one in shipped.items() if one.optimizer == optimizer}
    if rule is None:
        return found
    section = next((config["optimizer"] for config in found.values()), None)
    if section is None:
        rate = rule.rule.model_fields["lr"]
        section = {"type": optimizer, "params": {"lr": None if rate.is_required() else rate.default}}
    ways = {shipped[name].way for name in found}
    for name, one in shipped.items():
        if one.optimizer == RECOMMENDED and one.way not in ways:
            config = load_config(name)
            lr = section["params"]["lr"] or config["optimizer"]["params"]["lr"]
            found[name] = config | {"optimizer": with_section(section, ["params"], {"lr": lr})}
    return found


def _fit(
    estimator: Estimator,
    case: Case,
    memory: int,
    name: str,
    state: str,
    wanted: str,
    host_memory: int,
    ranks_per_machine: int,
) -> Candidate:
    """The largest micro-batch, a power of 2, with which `case` fits."""
    context = assumed_context(case.world_size) if case.device == "cuda" else 0
    looked: dict[int, Simulated] = {}

    def too_large(size: int) -> bool:
        looked[size] = estimator.look(replace(case, micro_batch=size))
        return looked[size].peak + context > memory

    fitting = bisect_left(MICRO_BATCHES, True, key=too_large)
    found = looked[MICRO_BATCHES[max(fitting - 1, 0)]]
    best, prediction = found.case, found.prediction()
    needs = prediction.needed
    peak = prediction.at_peak()
    setup = prediction.setup
    tokens = best.micro_batch * best.seq_len
    cost = _STAGE[setup.stage] * _OFFLOAD[tuple(setup.offload)] * (1 + _OVERHEAD_TOKENS / tokens)
    kept = setup.activations
    cost *= (_CHECKPOINT if kept.checkpoint else 1.0) * (_TILED if kept.tiled else 1.0)
    cost *= _OFFLOADED_ACTIVATIONS if kept.offload else 1.0
    cost *= 1 + _FORMAT * (list(FORMATS).index(state) if state in FORMATS else 0)
    state_format = FORMATS[state]["state_format"] if state in FORMATS else state
    host = sum(prediction.host.values()) * ranks_per_machine
    return Candidate(
        config=name,
        state=state,
        activations=setup.activations,
        micro_batch=best.micro_batch,
        needs=needs,
        fits=needs <= memory and host <= host_memory,
        host=host,
        cost=cost,
        state_format=state_format,
        asked=wanted in (ANY, state_format) or state not in FORMATS,
        host_fits=host <= host_memory,
        holds_most=max(peak, key=lambda category: peak[category]),
        json={**best.config, "train_micro_batch_size_per_gpu": best.micro_batch},
    )
