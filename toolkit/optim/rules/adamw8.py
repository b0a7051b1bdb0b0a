"""AdamW8: AdamW with compressed state."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import Field

from toolkit.errors import UserError
from toolkit.optim import adam
from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Beta, NonNegative, Rule, SecondBeta, State
from toolkit.optim.scales import DynamicScales, ScaledRule, Scales
from toolkit.optim.schedules import between, product_between


class AdamW8Rule(ScaledRule):
    """AdamW (Loshchilov and Hutter 2019).

    ::

        m     <- b1 m + (1 - b1) g
        v     <- b2 v + (1 - b2) g^2
        theta <- theta - eta_c wd theta - eta_c (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps),  eta_c = gamma_c eta(t)

    `betas` is (b1, b2). With `beta1_end`, b1 moves in a straight line from betas[0] to it over `total_steps`, and the
    product of all b1 so far stands in place of b1^t. `component_scales` is gamma by component, a number or how it moves
    (`toolkit.optim.schedules`), or "dynamic" (`DynamicScales`); without it all are 1.

    It is AMCS with alpha = 1 and all scales 1, bit for bit; with `beta1_end` it is AMCS's mode "single".
    """

    states: ClassVar[tuple[State, ...]] = adam.STATES
    direction = staticmethod(adam.direction)
    needs = ("total_steps",)
    update_error = MappingProxyType({"8bit": 3.2, "compact": 36.9, "minimal": 42.8})
    loss_price = MappingProxyType({"8bit": (-0.005, 0.022), "lean": (-0.008, 0.016)})

    lr: NonNegative = 6e-4
    betas: tuple[Beta, SecondBeta] = (0.9, 0.95)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.1
    beta1_end: Beta | None = None
    total_steps: int | None = Field(default=None, ge=1, strict=True)
    component_scales: Scales = None

    @classmethod
    def variant(cls, settings: Mapping[str, Any], **group: Any) -> type[Rule]:
        return AdamW8DynamicRule if cls.is_dynamic(settings) else AdamW8Rule

    def check_ready(self) -> None:
        super().check_ready()
        if self.beta1_end is not None and self.total_steps is None:
            raise UserError(
                f"AdamW8: total_steps is required because beta1_end={self.beta1_end!r} has beta1 move over the "
                "training; give total_steps (toolkit.initialize fills it in from the run) or no beta1_end"
            )

    def scalars(self, t: int) -> dict[str, float]:
        named = adam.scalars(t, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas, eps=self.eps)
        if self.beta1_end is not None:
            left = product_between(self.betas[0], self.beta1_end, "linear", t, self.total_steps)
            named |= {"m_rate": 1.0 - self.beta1_at(t), "m_correction": 1.0 / (1.0 - left)}
        return named

    def beta1_at(self, t: int) -> float:
        """b1 for optimizer step t = 1, 2, ...; after `total_steps` it holds its last value."""
        start = self.betas[0]
        return start if self.beta1_end is None else between(start, self.beta1_end, "linear", t, self.total_steps)

    def report(self, t: int) -> dict[str, float]:
        return super().report(t) | ({} if self.beta1_end is None else {"beta1": self.beta1_at(t)})


class AdamW8DynamicRule(DynamicScales, AdamW8Rule):
    """AdamW with `component_scales` "dynamic"."""

    states = (*AdamW8Rule.states, DynamicScales.LOG_SCALE)


AdamW8 = as_optimizer(AdamW8Rule)
