"""What rules share that make a hidden matrix's momentum orthogonal."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

from toolkit.optim.hidden import HiddenMatrixRule
from toolkit.optim.newton_schulz import MUON, POLAR_EXPRESS, orthogonal
from toolkit.optim.rule import Beta, NonNegative, Rule, SecondBeta


class OrthogonalRule(HiddenMatrixRule):
    """Fields and `transform` of these rules."""

    lr: NonNegative = 6e-4
    weight_decay: NonNegative = 0.1
    coefficients: Literal["muon", "polar-express"] = "muon"

    chosen: ClassVar[Mapping[str, str]] = MappingProxyType({"coefficients": "muon"})
    """The fields that `transform` looks at, which is given no hyper-parameters: every choice is a variant."""

    @classmethod
    def variant(cls, settings: Mapping[str, Any], *, component: str, matrix: bool) -> type[Rule]:
        rule = super().variant(settings, component=component, matrix=matrix)
        wanted = {name: str(settings.get(name, default)) for name, default in cls.chosen.items()}
        return rule if rule is not cls or wanted == cls.chosen else _choosing(cls, tuple(wanted.items()))

    @classmethod
    def transform(cls, matrix: Tensor) -> Tensor:
        return orthogonal(matrix, POLAR_EXPRESS if cls.chosen["coefficients"] == "polar-express" else MUON)


class NormalizedRule(OrthogonalRule):
    """Of these, the rules that divide by a second moment of what became orthogonal, at a step of a given rms.

    Subclasses have the field `eps`.
    """

    betas: tuple[Beta, SecondBeta] = (0.95, 0.95)
    eps: NonNegative

    def scalars(self, t: int) -> dict[str, float]:
        b1, b2 = self.betas
        decay = self.lr * self.weight_decay
        return {"step": 0.2 * self.lr, "decay": decay, "rate": 1.0 - b1, "rate2": 1.0 - b2, "eps": self.eps}


@cache
def _choosing(rule: type[OrthogonalRule], chosen: tuple[tuple[str, str], ...]) -> type[OrthogonalRule]:
    return type(rule.__name__, (rule,), {"chosen": dict(chosen), "__module__": rule.__module__})
