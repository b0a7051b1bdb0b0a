"""Muon8: momentum made orthogonal, for hidden matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from toolkit.optim.hidden import HiddenMatrixRule, is_hidden, with_adamw
from toolkit.optim.newton_schulz import MUON, POLAR_EXPRESS, orthogonal
from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Beta, Matrix, NonNegative, Rule, State


class Muon8Rule(HiddenMatrixRule):
    """Muon (Jordan et al. 2024) for hidden matrices; embeddings, head, norms and biases are trained with AdamW.

    ::

        m     <- mu m + (1 - mu) g
        o     =  Newton-Schulz(mu m + (1 - mu) g)            five steps on the whole matrix
        theta <- theta - eta wd theta - eta scale o

    `scaling` "moonlight" is scale = 0.2 sqrt(max(rows, columns)), with which o is as large as AdamW's updates are;
    "keller" is sqrt(max(1, rows / columns)). `coefficients` are "muon" or "polar-express". AdamW has `adamw_lr`
    (without it `lr`), `adamw_betas` and `adamw_eps`.
    """

    states = (State("m"),)
    statistics = (Matrix("o"),)
    update_error = MappingProxyType({"8bit": 10.8, "compact": 49.3, "minimal": 52.6})

    lr: NonNegative = 6e-4
    momentum: Beta = 0.95
    weight_decay: NonNegative = 0.1
    scaling: Literal["moonlight", "keller"] = "moonlight"
    coefficients: Literal["muon", "polar-express"] = "muon"

    @classmethod
    def variant(cls, settings: Mapping[str, Any], *, component: str, matrix: bool) -> type[Rule]:
        if not is_hidden(component, matrix):
            return Muon8AdamWRule
        own = {name: settings.get(name, Muon8Rule.model_fields[name].default) for name in ("scaling", "coefficients")}
        return _matrix_rule(**own)

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr, "decay": self.lr * self.weight_decay, "rate": 1.0 - self.momentum}

    @staticmethod
    def direction(theta: Tensor, g: Tensor, m: Tensor, **s: Tensor) -> Tensor:
        m = m + s["rate"] * (g - m)
        return m + s["rate"] * (g - m)

    @staticmethod
    def transform(matrix: Tensor) -> Tensor:
        return 0.2 * max(matrix.shape) ** 0.5 * orthogonal(matrix, MUON)

    @staticmethod
    def update(theta: Tensor, g: Tensor, m: Tensor, *, o: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return theta - (s["decay"] * theta + s["lr"] * o), m + s["rate"] * (g - m)


@cache
def _matrix_rule(scaling: str, coefficients: str) -> type[Rule]:
    """The rule with another `transform`, which is given no hyper-parameters."""
    if (scaling, coefficients) == ("moonlight", "muon"):
        return Muon8Rule
    table = POLAR_EXPRESS if coefficients == "polar-express" else MUON

    def transform(matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        scale = 0.2 * max(rows, columns) ** 0.5 if scaling == "moonlight" else max(1.0, rows / columns) ** 0.5
        return scale * orthogonal(matrix, table)

    return type("Muon8Rule", (Muon8Rule,), {"transform": staticmethod(transform), "__module__": __name__})


Muon8AdamWRule = with_adamw(Muon8Rule)

Muon8 = as_optimizer(Muon8Rule)
