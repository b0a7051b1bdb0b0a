"""Which shipped configuration, state format and micro-batch to train a model with on given GPUs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolkit.config import DeepSpeedSettings, load_config, shipped_configs
from toolkit.errors import UserError
from toolkit.estimate.predict import (
    Case,
    Estimator,
    Simulated,
    assumed_context,
    offered_activations,
    with_section,
)
from toolkit.estimate.prices import EXACT_FORMAT, default_format, offered
from toolkit.models.activations import checkpointable
from toolkit.optim import RECOMMENDED, RULES, find_rule
from toolkit.records.activations import Activations
from toolkit.records.lora import LoRA
from toolkit.state.layout import LEAN, LEANEST

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
MARGIN = 0.05
"""Share of a GPU's memory, and of the host's, that what is recommended leaves: for what nobody predicts.

On a GPU that is what the caching allocator reserves beyond what is allocated (at most 5 % is the goal of
docs/benchmarks/gpu.md); on the host Python, libraries, and freed memory that the C library keeps.
"""
NVME_PATH = "/mnt/nvme"
"""Of what is made here: whoever trains with it names a folder of theirs."""
ON_NVME = " on NVMe"
"""After the name of a configuration whose state is moved there."""
ANY = "any"

FORMATS: dict[str, dict[str, Any]] = {
    "fp32, bf16+8": {"state_format": EXACT_FORMAT, "weights": "bf16+8"},
    "fp32, bf16+8, released": {"state_format": EXACT_FORMAT, "weights": "bf16+8", "release_gradients": True},
    "8bit, bf16+8": {"state_format": "8bit", "weights": "bf16+8"},
    "8bit, bf16+8, released": {"state_format": "8bit", "weights": "bf16+8", "release_gradients": True},
    "compact, bf16+4": {"state_format": "compact", "weights": "bf16+4"},
    "compact, bf16+4, released": {"state_format": "compact", "weights": "bf16+4", "release_gradients": True},
    "minimal, bf16+4": {"state_format": "minimal", "weights": "bf16+4"},
    "minimal, bf16+4, released": {"state_format": "minimal", "weights": "bf16+4", "release_gradients": True},
    "lean, bf16": {"state_format": LEAN, "weights": "bf16"},
    "lean, bf16, released": {"state_format": LEAN, "weights": "bf16", "release_gradients": True},
    "leanest, bf16": {"state_format": LEANEST, "weights": "bf16"},
    "leanest, bf16, released": {"state_format": LEANEST, "weights": "bf16", "release_gradients": True},
}
"""What is tried for this package's rules, in order of preference."""


def formats_of(optimizer: str, wanted: str = ANY) -> dict[str, dict[str, Any]]:
    """Those of FORMATS that are offered for an optimizer: small ones where their price in loss has been measured, fp32
    where it is `wanted` or no other is recommended.

    Raises UserError where one is `wanted` that is not offered.
    """
    made = find_rule(optimizer)
    if made is None:
        if wanted not in (EXACT_FORMAT, ANY):
            raise UserError(f"--state-format is {wanted!r}, but the state of {optimizer}, DeepSpeed's own, is fp32.")
        return {EXACT_FORMAT: {}}
    if wanted != ANY and not offered(optimizer, wanted):
        names = ", ".join(name for name, one in RULES.items() if wanted in one.rule.loss_price)
        others = f"only for {names}" if names else "nor for any other"
        raise UserError(
            f"--state-format is {wanted!r}, but its price in loss is not measured for {optimizer}, {others}. "
            f"A config can have it (optimizer.params.state_format={wanted}), and `toolkit estimate` says what it needs."
        )
    beside = made.rule.beside
    exact = EXACT_FORMAT in (wanted, default_format(optimizer))
    return {
        state: {**params, **beside.get(params["state_format"], {})}
        for state, params in FORMATS.items()
        if offered(optimizer, params["state_format"]) and (exact or params["state_format"] != EXACT_FORMAT)
    }


# How much longer a token takes than without, for ranking only: assumed, not measured.
_CHECKPOINT = 1 / 3  # one more forward pass, where all blocks are computed again
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
    """On the device and, with what is offloaded, on the host, so that MARGIN is left of both."""
    close: bool
    """Whether it fits, but leaves less than that."""
    host: int
    """Bytes of host memory of one machine, all its ranks together."""
    disk: int
    """Bytes of a machine's disk, all its ranks together, which each step reads and writes."""
    cost: float
    """Assumed time of a token against that of the plainest way, without that of the disk."""
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
    state_format: str | None = None,
    host_memory: int,
    ranks_per_machine: int,
    say: Callable[[str], None] = lambda words: None,
) -> list[Candidate]:
    """All candidates: first what fits in the state format asked for, the fastest of them first, then what else fits,
    then what fits too closely.

    Where the first computes all blocks again, it is changed to do so with as few as fit, and the micro-batch that is
    fastest then. Where nothing fits in that state format, a rule's state is tried on NVMe, and what fits is added.

    Args:
        model: a preset or a folder with a config.json.
        gpu_memory: bytes of one device.
        optimizer: of the shipped configurations to try; for ways of sharding without one, a rule is tried in the
            recommended optimizer's.
        lora, conversations: as of `Case`.
        state_format: that of one of FORMATS, or "any"; None: `default_format`; what is no rule has its own.
        host_memory: bytes of one machine, which what is offloaded by its `ranks_per_machine` must fit into.
        say: is told what is looked at.

    Raises:
        UserError: as `Estimator.predict`.
    """
    state_format = state_format or default_format(optimizer)
    estimator, room = Estimator(several=True), _Room(gpu_memory, host_memory, ranks_per_machine)
    choices = offered_activations(model, device, lora)
    plain = Case(model, {}, world_size, 1, seq_len, device=device, loss=loss, lora=lora, conversations=conversations)
    cases = list(_cases(plain, optimizer, state_format))

    def tried(cases: Sequence[tuple[str, str, Case]]) -> Iterator[Candidate]:
        for number, (name, state, case) in enumerate(cases, 1):
            here: list[Candidate] = []
            for kept in choices:
                # For what does not fit on the device otherwise; the host gains nothing.
                slower = kept.tiled or kept.offload
                if slower and (any(one.fits for one in here) or not any(one.host_fits for one in here)):
                    break
                say(f"{number} of {len(cases)}: {name}, {state}, {kept}")
                largest = _largest(estimator, replace(case, activations=kept), room)
                here.append(_candidate(largest, room, name, state, state_format))
            yield from here

    found = list(tried(cases))
    if not any(one.fits and one.asked for one in found):
        found += [one for one in tried(list(_on_nvme(cases, state_format))) if one.fits]

    def order(one: Candidate) -> tuple[Any, ...]:
        # Where ranks do not matter stages 1 and 2 are the same: the usual choice comes first.
        rank = (one.fits and one.asked, one.fits, one.close)
        return *(not held for held in rank), one.cost if one.fits else one.needs, "zero2" not in one.config

    first, *others = sorted(found, key=order)
    if first.fits and first.asked and first.activations == Activations(checkpoint=True):
        say(f"{first.config}, {first.state}: the fewest blocks to compute again")
        sizes = (size for size in MICRO_BATCHES if size <= first.micro_batch)
        passes = [replace(plain, config=first.json, micro_batch=size) for size in sizes]
        fewest = _fewest_blocks(estimator, passes, room)
        first = _candidate(fewest, room, first.config, first.state, state_format)
    return [first, *others]


@dataclass(frozen=True)
class _Room:
    """Bytes of a device and of a machine's host, and the ranks that share the latter."""

    device: int
    host: int
    ranks: int

    def left(self, found: Simulated) -> int:
        """Bytes that are left of a device beside the margin; below 0 where it does not hold that."""
        context = assumed_context(found.case.world_size) if found.case.device == "cuda" else 0
        return usable(self.device) - found.peak - context


def usable(memory: int) -> int:
    """Bytes that what is recommended may take of so many."""
    return round(memory * (1 - MARGIN))


def _cases(plain: Case, optimizer: str, wanted: str) -> Iterator[tuple[str, str, Case]]:
    formats = formats_of(optimizer, wanted)
    for name, base in _bases(optimizer).items():
        ds = DeepSpeedSettings.read(base)
        for state, params in formats.items():
            if params.get("release_gradients") and ds.waits_for:
                continue
            config = with_section(base, ["optimizer", "params"], params)
            yield name, state, replace(plain, config=config)


def _on_nvme(cases: Sequence[tuple[str, str, Case]], wanted: str) -> Iterator[tuple[str, str, Case]]:
    """Those of the format `wanted` that offload a rule's state to the host, with it on NVMe.

    DeepSpeed's own way of that needs a library beside it.
    """
    for name, state, case in cases:
        if case.ds.rule and case.ds.offload_optimizer == "cpu" and _asked(state, wanted):
            place = {"device": "nvme", "nvme_path": NVME_PATH}
            config = with_section(case.config, ["zero_optimization", "offload_optimizer"], place)
            yield name + ON_NVME, state, replace(case, config=config)


def _bases(optimizer: str) -> dict[str, dict[str, Any]]:
    """The JSONs to try, by the name of the shipped configuration that each is, or was made from with another rule."""
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
            found[f"{name} with {optimizer}"] = config | {"optimizer": with_section(section, ["params"], {"lr": lr})}
    return found


def _state_format(state: str) -> str:
    return str(FORMATS[state]["state_format"]) if state in FORMATS else state


def _asked(state: str, wanted: str) -> bool:
    return wanted in (ANY, _state_format(state)) or state not in FORMATS


def _largest(estimator: Estimator, case: Case, room: _Room) -> Simulated:
    """With the largest micro-batch, a power of 2, with which `case` fits; with 1 where none does."""
    looked: dict[int, Simulated] = {}

    def too_large(size: int) -> bool:
        looked[size] = estimator.look(replace(case, micro_batch=size))
        return room.left(looked[size]) < 0

    fitting = bisect_left(MICRO_BATCHES, True, key=too_large)
    return looked[MICRO_BATCHES[max(fitting - 1, 0)]]


def _fewest_blocks(estimator: Estimator, cases: Sequence[Case], room: _Room) -> Simulated:
    """The fastest of `cases`, which differ in the micro-batch and fit where all blocks are computed again, with as few
    of them as fit."""
    every = Activations(checkpoint=True)
    most = len(checkpointable(estimator.look(replace(cases[0], activations=every)).run.model))

    def look(case: Case, count: int) -> Simulated:
        some = Activations(checkpoint=True, blocks=count) if count else Activations()
        return estimator.look(replace(case, activations=every if count == most else some))

    def share(few: Simulated, many: Simulated) -> float:
        """Of the blocks that `many` computes again and `few` does not, those that must be, if all take as much."""
        lacks, left = -room.left(few), room.left(many)
        return lacks / (lacks + left) if lacks > 0 else 0.0

    ends = [(look(case, 0), look(case, most)) for case in cases]
    few, many = min(ends, key=lambda both: _overhead(both[0].case) * (1 + _CHECKPOINT * share(*both)))
    if room.left(few) >= 0:
        return few
    low, high = 0, most
    while high - low > 1:
        between = low + math.ceil(share(few, many) * (high - low))
        count = min(max(between, low + 1), high - 1)
        tried = look(few.case, count)
        if room.left(tried) >= 0:
            high, many = count, tried
        else:
            low, few = count, tried
    return many


def _overhead(case: Case) -> float:
    return 1 + _OVERHEAD_TOKENS / (case.micro_batch * case.seq_len)


def _candidate(found: Simulated, room: _Room, name: str, state: str, wanted: str) -> Candidate:
    """What is said of it."""
    best, prediction = found.case, found.prediction()
    needs = prediction.needed
    held = prediction.at_peak() | {"context": prediction.context}
    setup = prediction.setup
    cost = _STAGE[setup.stage] * _OFFLOAD[tuple(setup.offload)] * _overhead(best)
    kept = setup.activations
    again = kept.blocks / len(checkpointable(found.run.model)) if kept.blocks else float(kept.checkpoint)
    cost *= (1 + _CHECKPOINT * again) * (_TILED if kept.tiled else 1.0)
    cost *= _OFFLOADED_ACTIVATIONS if kept.offload else 1.0
    cost *= 1 + _FORMAT * (list(FORMATS).index(state) if state in FORMATS else 0)
    host, disk = (sum(sizes.values()) * room.ranks for sizes in (prediction.host, prediction.nvme))
    host_fits = host <= usable(room.host)
    fits = needs <= usable(room.device) and host_fits
    return Candidate(
        config=name,
        state=state,
        activations=setup.activations,
        micro_batch=best.micro_batch,
        needs=needs,
        fits=fits,
        close=not fits and needs <= room.device and host <= room.host,
        host=host,
        disk=disk,
        cost=cost,
        state_format=_state_format(state),
        asked=_asked(state, wanted),
        host_fits=host_fits,
        holds_most=max(held, key=lambda category: held[category]),
        json={**best.config, "train_micro_batch_size_per_gpu": best.micro_batch},
    )
