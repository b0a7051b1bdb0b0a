"""NorMuon: orthogonal momentum, a rate for each row."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor

from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.orthogonal import NormalizedRule
from toolkit.optim.rule import Matrix, Mean, NonNegative, State


class NorMuonRule(NormalizedRule):
    """NorMuon (Li et al. 2025) for hidden matrices; embeddings, head, norms and biases are trained with AdamW.

    ::

        m     <- b1 m + (1 - b1) g
        o     =  Newton-Schulz(m)                            five steps on the whole matrix
        v_row <- b2 v_row + (1 - b2) mean(o^2)               of each row
        u     =  o / (sqrt(v_row) + eps)
        theta <- theta - eta wd theta - 0.2 eta u / rms(u)   rms over the matrix

    `coefficients` are "muon" or "polar-express". AdamW has `adamw_lr` (without it `lr`), `adamw_betas` and `adamw_eps`.
    """

    states = (State("m"), State("v_row", of="rows"))
    statistics = (Matrix("o"), Mean("o2", over="row"), Mean("u2", over="parameter", by="measure_size"))
    update_error = MappingProxyType({"8bit": 12.2, "compact": 52.4, "minimal": 55.4})
    loss_price = MappingProxyType({"8bit": (-0.003, 0.008)})

    eps: NonNegative = 1e-10

    @staticmethod
    def direction(theta: Tensor, g: Tensor, m: Tensor, **s: Tensor) -> Tensor:
        return m + s["rate"] * (g - m)

    @staticmethod
    def measure(theta: Tensor, g: Tensor, m: Tensor, *, o: Tensor, **s: Tensor) -> Tensor:
        return o * o

    @staticmethod
    def follow(v_row: Tensor, *, o2: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (v_row + s["rate2"] * (o2 - v_row),)

    @staticmethod
    def measure_size(theta: Tensor, g: Tensor, m: Tensor, *, o: Tensor, v_row: Tensor, **s: Tensor) -> Tensor:
        return (o / (v_row.sqrt() + s["eps"])) ** 2

    @staticmethod
    def update(
        theta: Tensor, g: Tensor, m: Tensor, *, o: Tensor, v_row: Tensor, u2: Tensor, **s: Tensor
    ) -> tuple[Tensor, ...]:
        u = o / (v_row.sqrt() + s["eps"])
        # Of a gradient that is all 0, u is 0, too.
        step = s["step"] * u2.clamp(min=1e-30).rsqrt()
        return theta - (s["decay"] * theta + step * u), m + s["rate"] * (g - m)


NorMuon = as_optimizer(NorMuonRule)
