"""The batch of a step: micro-batch x gradient accumulation x world size, where any two of three give the third."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UserError

MICRO, ACCUMULATION, GLOBAL = "micro-batch", "gradient accumulation", "global batch"
WORLD = "world size"
JSON_KEYS = {
    MICRO: "train_micro_batch_size_per_gpu",
    ACCUMULATION: "gradient_accumulation_steps",
    GLOBAL: "train_batch_size",
}


LARGEST_MICRO = 2**20
"""Sequences of a forward pass: beyond that sizes of tensors overflow, and no memory holds them."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one optimizer step: `total` = `micro` * `accumulation` * `world_size`."""

    micro: int
    accumulation: int
    world_size: int

    @property
    def total(self) -> int:
        return self.micro * self.accumulation * self.world_size


@dataclass(frozen=True)
class Kept:
    """The batch of the run that is resumed: `total` sequences a step; `micro` where it is known."""

    total: int
    micro: int | None = None


def stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of MICRO, ACCUMULATION and GLOBAL that a DeepSpeed JSON gives; "auto" counts as absent."""
    return {name: config[key] for name, key in JSON_KEYS.items() if config.get(key) not in (None, "auto")}


def resolve_batch(
    flags: Mapping[str, int | None], config: Mapping[str, Any], world_size: int, kept: Kept | None = None
) -> Batch:
    """The batch from flags and JSON: any two of micro-batch, accumulation and global batch give the third.

    A flag overrides the JSON's key. What is still open comes from the JSON, the global batch first where
    the JSON fixes one, so that changing the micro-batch or the number of ranks keeps the sequences of a
    step; a key of the JSON that no longer fits beside the flags is replaced. A micro-batch of the JSON that is too
    large for the global batch, or does not divide it, is lowered.

    Args:
        flags: MICRO, ACCUMULATION and GLOBAL to what the user typed, or None.
        config: the DeepSpeed JSON; "auto" counts as absent.
        kept: the batch of the run that is resumed, which stays unless the flags fix another one.

    Raises:
        UserError: the three contradict each other or do not divide, nothing fixes a batch, or `kept` cannot stay.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    in_json = stated(config)
    for name, value in [*in_json.items(), *given.items()]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{JSON_KEYS[name]} is {value!r}, but it must be a whole number above 0.")
    if kept is not None and GLOBAL not in given and not {MICRO, ACCUMULATION} <= given.keys():
        micro = kept.micro or in_json.get(MICRO)
        known = {} if micro is None else {JSON_KEYS[MICRO]: micro}
        try:
            return resolve_batch(given | {GLOBAL: kept.total}, known, world_size)
        except UserError as error:
            raise UserError(
                f"the run that is resumed has {kept.total} sequences a step, which cannot be kept: "
                f"{str(error).rstrip('.')}; give --global-batch to change it."
            ) from None
    typed = set(given)
    if given:
        for name in (GLOBAL, MICRO, ACCUMULATION):
            if len(given) < 2 and name in in_json:
                given.setdefault(name, in_json[name])
    else:
        given = in_json
    if given.keys() <= {ACCUMULATION}:
        raise UserError(
            "the batch size is not given: give --micro-batch or --global-batch, "
            f"or {JSON_KEYS[MICRO]} in the DeepSpeed JSON."
        )
    if len(given) == 1:
        given = {ACCUMULATION: 1, **given}
    micro, accumulation, total = given.get(MICRO), given.get(ACCUMULATION), given.get(GLOBAL)
    if micro is None:
        micro = _divide(total, {ACCUMULATION: accumulation, WORLD: world_size})
    elif accumulation is None and MICRO in typed:
        accumulation = _divide(total, {MICRO: micro, WORLD: world_size})
    elif accumulation is None:
        each = _divide(total, {WORLD: world_size})
        micro = next(size for size in range(min(micro, each), 0, -1) if each % size == 0)
        accumulation = each // micro
    assert accumulation is not None
    batch = Batch(micro, accumulation, world_size)
    if micro > LARGEST_MICRO:
        raise UserError(f"the micro-batch is {micro}, but it must be at most {LARGEST_MICRO}.")
    if total is not None and batch.total != total:
        raise UserError(
            f"the batch sizes do not multiply: micro-batch {micro} * gradient accumulation {accumulation} "
            f"* {WORLD} {world_size} = {batch.total}, but the global batch is {total}."
        )
    return batch


def _divide(total: int | None, factors: Mapping[str, int | None]) -> int:
    assert total is not None
    product = 1
    for value in factors.values():
        product *= value or 1
    if total % product:
        shown = " * ".join(f"{name} {value}" for name, value in factors.items())
        shown += f" = {product}" if len(factors) > 1 else ""
        low, high = total // product * product, (total // product + 1) * product
        nearest = f"nearest that fit: {low} or {high}" if low else f"nearest that fits: {high}"
        raise UserError(f"the global batch {total} is not a multiple of {shown}; {nearest}.")
    return total // product
