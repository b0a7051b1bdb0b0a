"""Which adapters a run trains in the place of a model's own weights: `--lora`, and its words.

``r=16,alpha=32,targets=all-linear,dropout=0``: each may be left out, and stands for this then. `targets` are names of
linear modules joined by ``+`` (``q_proj+v_proj``), or all but the head.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from toolkit.errors import nearest

FLAG = "--lora"
ALL = "all-linear"
WORDS = ("r", "alpha", "targets", "dropout")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters: of a weight W that stays as it is, W + alpha / r B A is what the model computes with.

    Args:
        r: rows of A and columns of B.
        alpha: what their product is scaled by, times r.
        targets: the modules whose weights have adapters.
        dropout: share of an adapter's inputs that are zero in training.
    """

    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (ALL,)
    dropout: float = 0.0

    @classmethod
    def read(cls, value: Any) -> LoRA:
        """From what a user types or a file says.

        Raises ValueError, whose message goes on after "it": "must be ...".
        """
        if isinstance(value, cls):
            return value
        given: dict[str, Any] = {}
        for word in value.split(",") if isinstance(value, str) else [""]:
            name, equals, said = (part.strip() for part in word.partition("="))
            if name not in WORDS or not equals:
                hint = nearest(name, WORDS) if name else ""
                raise ValueError(
                    f"must be some of r=16,alpha=32,targets={ALL},dropout=0 with commas.{hint}".rstrip(".")
                )
            if name in given:
                raise ValueError(f"must name {name} once")
            given[name] = tuple(said.split("+")) if name == "targets" else _number(name, said)
        r = given.get("r", cls.r)
        if r < 1 or r != int(r):
            raise ValueError("must have a whole number from 1 on as r, as in r=16")
        if not given.get("alpha", 1) > 0 or not 0 <= given.get("dropout", 0) < 1:
            raise ValueError("must have an alpha above 0 and a dropout from 0 to below 1")
        if not all(given.get("targets", (ALL,))):
            raise ValueError(f"must name modules as targets, as in targets=q_proj+v_proj or targets={ALL}")
        return cls(**(given | {"r": int(r)} | ({} if "alpha" in given else {"alpha": 2.0 * r})))

    def __str__(self) -> str:
        """As a user types it, in one way for each choice."""
        said = asdict(self) | {"targets": "+".join(self.targets)}
        return ",".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in said.items()
        )


def _number(name: str, said: str) -> float:
    try:
        number = float(said)
        if not math.isfinite(number):
            raise ValueError
        return number
    except ValueError:
        raise ValueError(f"must have a number as {name}, as in {name}={getattr(LoRA, name):g}") from None


Written = Annotated[LoRA, BeforeValidator(LoRA.read), PlainSerializer(str)]
"""Type of a field that is text in files."""
