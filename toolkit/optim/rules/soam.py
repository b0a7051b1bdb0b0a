"""SOAM: momentum per component."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Beta, Matrix, Mean, NonNegative, Rule, SecondBeta, State, component_mapping

DEFAULT_BETAS = {"ffn": 0.95}
"""b1 by component where the paper departs from `betas[0]`."""

DEFAULT_LR_RATIOS = {"ffn": 1.5e-2 / 8e-3}
"""eta by component over the base rate where the paper departs from it."""


class SOAMRule(Rule):
    """SOAM (paper: equations 1 to 3, section 4.1).

    ::

        m     <- b1_i m + (1 - b1_i) g
        v     <- b2 v + (1 - b2) g^2
        theta <- theta - eta_i wd theta - eta_i (m / (1 - b1_i^t)) / sqrt(v / (1 - b2^t) + eps)

    with eps inside the root, and b1_i and eta_i those of the parameter's component i.

    `betas` is (b1, b2). `component_betas` gives b1 and `component_lrs` gives eta by component, laid over the
    paper's values (ffn: b1 0.95 and 1.875 times `lr`); every other component takes betas[0] and `lr`.
    A scheduler moves all rates together: it is their ratios to `lr` that are kept.

    `max_update` bounds how far a parameter moves in a step, relative to its size (`SOAMBoundedRule`).
    """

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v", signed=False))
    update_error = MappingProxyType({"8bit": 3.0, "compact": 49.4, "minimal": 51.7})
    loss_price = MappingProxyType({"8bit": (0.001, 0.012), "compact": (-0.038, 0.034)})

    lr: NonNegative = 8e-3
    betas: tuple[Beta, SecondBeta] = (0.9, 0.95)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    component_betas: dict[str, Beta] | None = None
    component_lrs: dict[str, NonNegative] | None = None
    max_update: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None = None

    @field_validator("betas", mode="before")
    @classmethod
    def _check_betas(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and len(value) > 2:
            raise ValueError("must be two numbers, b1 of the momentum and b2 of the second moment (AMCS has three)")
        return value

    @field_validator("component_betas", "component_lrs")
    @classmethod
    def _check_components(cls, value: dict[str, float] | None) -> dict[str, float]:
        return component_mapping(value)

    @classmethod
    def variant(cls, settings: Mapping[str, Any], **group: Any) -> type[Rule]:
        return SOAMRule if settings.get("max_update") is None else SOAMBoundedRule

    def check_ready(self) -> None:
        if self.component_lrs and self.lr == 0:
            raise UserError("SOAM: lr is 0, but component_lrs needs a positive lr, to whose schedule they are tied")

    def for_component(self, component: str) -> dict[str, Any]:
        b1 = (DEFAULT_BETAS | (self.component_betas or {})).get(component, self.betas[0])
        rates = self.component_lrs or {}
        scale = rates[component] / self.lr if component in rates else DEFAULT_LR_RATIOS.get(component, 1.0)
        return {"lr_scale": scale, "betas": (b1, self.betas[1])}

    def scalars(self, t: int) -> dict[str, float]:
        b1, b2 = self.betas
        return {
            "decay": self.lr * self.weight_decay,
            "eps": self.eps,
            "m_rate": 1.0 - b1,
            "v_rate": 1.0 - b2,
            "step": self.lr / (1.0 - b1**t),
            "v_correction": 1.0 / (1.0 - b2**t),
        }

    @staticmethod
    def direction(g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        """The update without rate and weight decay, and the new states."""
        m, v = states
        m = m + s["m_rate"] * (g - m)
        v = v + s["v_rate"] * (g * g - v)
        return m / (v * s["v_correction"] + s["eps"]).sqrt(), m, v

    @classmethod
    def update(cls, theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        step, *new = cls.direction(g, *states, **s)
        return theta - (s["decay"] * theta + s["step"] * step), *new


class SOAMBoundedRule(SOAMRule):
    """SOAM with a bound on the update of each parameter, relative to its size.

    ::

        u     =  (m / (1 - b1_i^t)) / sqrt(v / (1 - b2^t) + eps)
        k     =  min(1, max_update max(rms(theta), 1e-3) / (eta_i rms(u)))                over the parameter
        theta <- theta - eta_i wd theta - k eta_i u

    Where no update is larger than that, it is SOAM.
    """

    LEAST: ClassVar[float] = 1e-3
    """What has a smaller rms, such as a bias of zeros, moves as if it had this one."""

    statistics: ClassVar[tuple[Mean | Matrix, ...]] = (
        Mean("theta2", over="parameter"),
        Mean("step2", over="parameter"),
    )

    def scalars(self, t: int) -> dict[str, float]:
        assert self.max_update is not None
        return super().scalars(t) | {"bound": self.max_update}

    @classmethod
    def measure(cls, theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        step, *_ = cls.direction(g, *states, **s)
        return theta * theta, step * step

    @classmethod
    def update(cls, theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        most = s["bound"] * s["theta2"].sqrt().clamp(min=cls.LEAST)
        moved = s["step"] * s["step2"].sqrt()
        rate = torch.where(moved > most, most / s["step2"].sqrt(), s["step"])
        return super().update(theta, g, *states, **(s | {"step": rate}))


SOAM = as_optimizer(SOAMRule)
