"""What rules share that make a hidden matrix's momentum orthogonal."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

from toolkit.optim.hidden import HiddenMatrixRule
from toolkit.optim.newton_schulz import MUON, POLAR_EXPRESS, orthogonal
from toolkit.optim.rule import NonNegative, Rule


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


@cache
def _choosing(rule: type[OrthogonalRule], chosen: tuple[tuple[str, str], ...]) -> type[OrthogonalRule]:
    return type(rule.__name__, (rule,), {"chosen": dict(chosen), "__module__": rule.__module__})
