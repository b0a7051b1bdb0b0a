"""What a run keeps of activations from a forward pass for its backward pass: `--activations`, and its words.

* ``full``: all that autograd saves.
* ``checkpoint``: of each transformer block only its input; the block runs again in the backward pass. ``checkpoint:N``:
  of the first N blocks.
* ``offload``: ``checkpoint``, and those inputs lie in the host's memory meanwhile.
* ``tiled``: the MLP of each block runs on some tokens at a time, in both passes, and keeps only its input.
* ``budget:SHARE``: of what a compiled block saves at most this share, from 0 to 1; torch's compiler computes again what
  is cheapest to compute. With ``--compile-model`` only, and without other words.

Words are joined by commas: ``checkpoint,tiled``, ``checkpoint:8,offload``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from toolkit.errors import UserError, but, nearest

FULL, CHECKPOINT, OFFLOAD, TILED, BUDGET = WORDS = ("full", "checkpoint", "offload", "tiled", "budget")
_ALONE = (FULL, BUDGET)
FLAG = "--activations"
HELP = (
    "What is kept for the backward pass: full, checkpoint, checkpoint:N, offload, tiled, or some with commas; "
    "or budget:SHARE of a compiled model."
)

# Names of today by those that older versions wrote: a field's, and a flag's.
_RENAMED = {"activation_checkpointing": "activations", "--activation-checkpointing": FLAG}


@dataclass(frozen=True)
class Activations:
    """One choice of what is kept; by default everything.

    Args:
        checkpoint: blocks are computed again.
        blocks: only so many, the first ones; None: all.
        offload: what checkpointed blocks keep lies on the host.
        tiled: MLPs run in tiles.
        budget: the share of what compiled blocks save that they may keep; alone.
    """

    checkpoint: bool = False
    blocks: int | None = None
    offload: bool = False
    tiled: bool = False
    budget: float | None = None

    def __post_init__(self) -> None:
        assert self.checkpoint or not (self.offload or self.blocks), self
        assert self.budget is None or not (self.checkpoint or self.tiled), self

    @classmethod
    def read(cls, value: Any) -> Activations:
        """From what a user types or a file says; older versions wrote whether blocks are checkpointed.

        Raises ValueError, whose message goes on after "it": "must be ...".
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, bool):
            return cls(checkpoint=value)
        words = [word.strip() for word in value.split(",")] if isinstance(value, str) else [""]
        names = [word.partition(":")[0] for word in words]
        for name in names:
            if name not in WORDS:
                raise ValueError(
                    f"must be {FULL}, {CHECKPOINT}, {OFFLOAD} or {TILED}, or some of these with commas, or "
                    f"{BUDGET}:SHARE{_hint(name)}"
                )
            if names.count(name) > 1:
                raise ValueError(f"must name {name} once")
        for alone in _ALONE:
            if alone in names and len(names) > 1:
                others = ", ".join(name for name in names if name != alone)
                raise ValueError(f"must be either {alone} or {others}, not both")
        if names == [BUDGET]:
            return cls(budget=_share(words[0]))
        return cls(
            checkpoint=CHECKPOINT in names or OFFLOAD in names,
            blocks=_blocks(words),
            offload=OFFLOAD in names,
            tiled=TILED in names,
        )

    def __str__(self) -> str:
        """As a user types it, in one way for each choice."""
        some = f"{CHECKPOINT}:{self.blocks}" if self.blocks is not None else CHECKPOINT
        if self.budget is not None:
            return f"{BUDGET}:{self.budget:.15g}"
        # offload alone says that blocks are checkpointed.
        first = some if self.checkpoint and (self.blocks is not None or not self.offload) else None
        found = [first, OFFLOAD if self.offload else None, TILED if self.tiled else None]
        return ",".join(word for word in found if word is not None) or FULL

    def priced(self, blocks: int) -> Activations:
        """What holds about as much of a model of so many blocks: of a budget's share all, of the others the input."""
        if self.budget is None:
            return self
        again = math.ceil((1 - self.budget) * blocks)
        return Activations(checkpoint=True, blocks=None if again == blocks else again) if again else Activations()

    def check_device(self, device: str) -> None:
        """Raise UserError where `device` ("cpu", "cuda") has no host beside it to offload to."""
        if self.offload and device == "cpu":
            raise UserError(
                f"{FLAG} is {str(self)!r}, but on a CPU the host is the device: activations lie there already; leave "
                f"{OFFLOAD} out, or write {CHECKPOINT} in its place."
            )


def _hint(name: str) -> str:
    hint = nearest(name, WORDS) if name else ""
    return f".{hint}" if hint else ""


def _share(word: str) -> float:
    """SHARE of ``budget:SHARE``."""
    _, _, number = word.partition(":")
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", number, re.ASCII) or (share := float(number)) > 1:
        raise ValueError(f"must have a number from 0 to 1 after {BUDGET}, as in {BUDGET}:0.5")
    return share


def _blocks(words: list[str]) -> int | None:
    """N of ``checkpoint:N``."""
    for word in words:
        name, colon, number = word.partition(":")
        if not colon:
            continue
        if name != CHECKPOINT:
            raise ValueError(f"must have a number of blocks after {CHECKPOINT} only, as in {CHECKPOINT}:4")
        if not (number.isascii() and number.isdigit() and int(number[:9]) > 0 and len(number) < 9):
            raise ValueError(f"must have a number of blocks from 1 on after {CHECKPOINT}, as in {CHECKPOINT}:4")
        return int(number)
    return None


def parse_activations(text: str | None) -> Activations | None:
    """What `--activations` was given; None where it was not.

    Raises UserError, which says what is allowed.
    """
    if text is None:
        return None
    try:
        return Activations.read(text)
    except ValueError as error:
        raise UserError(f"{FLAG} is {text!r}, {but(str(error))}") from None


def renamed(values: Any) -> Any:
    """What a file says by name, with the setting that older versions wrote under its name and in its words of today."""
    if not isinstance(values, Mapping) or not _RENAMED.keys() & values.keys():
        return values
    found = {}
    for name, value in values.items():
        old = name in _RENAMED
        found[_RENAMED.get(name, name)] = str(Activations.read(value)) if old and isinstance(value, bool) else value
    return found


Written = Annotated[Activations, BeforeValidator(Activations.read), PlainSerializer(str)]
"""Type of a field that is text in files."""
