"""SCALE: gradients over their rms by output."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from toolkit.optim.hidden import HiddenMatrixRule, with_adamw
from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Beta, Matrix, Mean, NonNegative, Rule, State


class SCALERule(HiddenMatrixRule):
    """SCALE (Glentis et al. 2025) for matrices; norms and biases are trained with AdamW.

    ::

        m     <- momentum m + (1 - momentum) g                    for the head;  m = g for all other matrices
        theta <- theta - eta wd theta - eta scale m / rms(m)      rms over the inputs of each output

    An output is a row of a weight as PyTorch has it; of an embedding [vocabulary, hidden] it is a column. Only the head
    keeps a momentum. `scale` makes the step, whose rms is 1, about as large as AdamW's updates. AdamW has `adamw_lr`
    (without it `lr`), `adamw_betas` and `adamw_eps`.
    """

    states: ClassVar[tuple[State, ...]] = ()
    statistics: ClassVar[tuple[Mean | Matrix, ...]] = (Mean("line2", over="row"),)
    update_error = MappingProxyType({"8bit": 1.3, "compact": 15.8, "minimal": 15.8})

    lr: NonNegative = 6e-4
    momentum: Beta = 0.9
    scale: NonNegative = 0.2
    weight_decay: NonNegative = 0.1

    @classmethod
    def variant(cls, settings: Mapping[str, Any], *, component: str, matrix: bool) -> type[Rule]:
        if not matrix:
            return with_adamw(SCALERule)
        return {"head": SCALEHeadRule, "embedding": SCALEEmbeddingRule}.get(component, SCALERule)

    def scalars(self, t: int) -> dict[str, float]:
        return {
            "rate": self.lr * self.scale,
            "decay": self.lr * self.weight_decay,
            "m_rate": 1.0 - self.momentum,
        }

    @staticmethod
    def measure(theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> Tensor:
        return g * g

    @staticmethod
    def update(theta: Tensor, g: Tensor, *states: Tensor, line2: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (theta - (s["decay"] * theta + s["rate"] * g / line2.sqrt().clamp(min=1e-30)),)


class SCALEEmbeddingRule(SCALERule):
    """With outputs that are columns."""

    statistics = (Mean("line2", over="column"),)


class SCALEHeadRule(SCALERule):
    """With a momentum in the gradient's place."""

    states = (State("m"),)

    @staticmethod
    def measure(theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> Tensor:
        (m,) = states
        m = m + s["m_rate"] * (g - m)
        return m * m

    @staticmethod
    def update(theta: Tensor, g: Tensor, *states: Tensor, line2: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        (m,) = states
        m = m + s["m_rate"] * (g - m)
        return theta - (s["decay"] * theta + s["rate"] * m / line2.sqrt().clamp(min=1e-30)), m


SCALE = as_optimizer(SCALERule)
