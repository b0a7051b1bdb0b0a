"""SinkGD: gradients with even rows and columns."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from toolkit.optim.hidden import HiddenMatrixRule
from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Matrix, NonNegative, State


class SinkGDRule(HiddenMatrixRule):
    """SinkGD (Scetbon et al. 2025) for hidden matrices; embeddings, head, norms and biases are trained with AdamW.

    ::

        x     =  g;   five times: divide each row of x by its rms, then each column
        theta <- theta - eta wd theta - eta scale x

    Hidden matrices keep no state. `scale` makes x, whose rms is 1, about as large as AdamW's updates. AdamW has
    `adamw_lr` (without it `lr`), `adamw_betas` and `adamw_eps`.
    """

    states: ClassVar[tuple[State, ...]] = ()
    statistics = (Matrix("x"),)
    update_error = MappingProxyType({"8bit": 2.9, "compact": 28.2, "minimal": 33.4})

    lr: NonNegative = 6e-4
    scale: NonNegative = 0.2
    weight_decay: NonNegative = 0.1

    def scalars(self, t: int) -> dict[str, float]:
        return {"rate": self.lr * self.scale, "decay": self.lr * self.weight_decay}

    @staticmethod
    def direction(theta: Tensor, g: Tensor, **s: Tensor) -> Tensor:
        return g * 1.0  # what is returned must be new

    @staticmethod
    def transform(matrix: Tensor) -> Tensor:
        for _ in range(5):
            for dim in (1, 0):
                matrix = matrix / matrix.square().mean(dim, keepdim=True).sqrt().clamp(min=1e-30)
        return matrix

    @staticmethod
    def update(theta: Tensor, g: Tensor, *, x: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (theta - (s["decay"] * theta + s["rate"] * x),)


SinkGD = as_optimizer(SinkGDRule)
