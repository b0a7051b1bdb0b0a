"""AMCS: dual momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.optimizer import as_optimizer
from toolkit.optim.rule import Beta, Matrix, Mean, NonNegative, Rule, SecondBeta, State
from toolkit.optim.scales import DynamicScales, ScaledRule, Scales
from toolkit.optim.schedules import Setting, between, check_setting, moves, product_between, value_at

PAPER_SCALES = MappingProxyType({"attention": 1.2, "ffn": 1.0, "embedding": 0.8, "head": 0.8})
"""gamma_c of the paper; "embeddings" there means both vocabulary matrices. All else is 1.0."""


AGREEMENT = "agreement"


class AMCSRule(ScaledRule):
    """AMCS (paper: equations 1 and 2, section 3.2).

    ::

        m_fast <- b_f m_fast + (1 - b_f) g
        m_slow <- b_s m_slow + (1 - b_s) g
        v      <- b_v v      + (1 - b_v) g^2
        m      =  a(t) m_fast / (1 - b_f^t) + (1 - a(t)) m_slow / (1 - b_s^t)
        theta  <- theta - eta_c wd theta - eta_c m / (sqrt(v / (1 - b_v^t)) + eps),   eta_c = gamma_c eta(t)

    With a = 1 and all gamma 1 this is AdamW(b_f, b_v); with a = 0 it is AdamW(b_s, b_v).

    `betas` is (b_f, b_s, b_v). `alpha` is a(t): "linear" (1 to 0 over `total_steps`), "cosine" (the same, as half a
    cosine), one of them with its ends (["linear", 1, 0.5]), a constant in [0, 1], or a list of (fraction of training,
    value) points joined by straight lines; or "agreement" (`AMCSAgreementRule`). `component_scales` is gamma by
    component, likewise, laid over the paper's values; or "dynamic" (`DynamicScales`).

    `mode` "mixed" keeps both momenta in another form, which small formats disturb less (`AMCSMixedRule`); "single" is
    an approximation that keeps one, whose beta follows a(t) (`AMCSSingleRule`).
    """

    default_scales = PAPER_SCALES
    states: ClassVar[tuple[State, ...]] = (
        State("m_fast", residual_of="m_slow"),
        State("m_slow"),
        State("v", signed=False),
    )
    needs = ("total_steps",)
    update_error = MappingProxyType({"8bit": 2.9, "compact": 12.1, "minimal": 22.7, "lean": 41.4})
    loss_price = MappingProxyType(
        {
            "8bit": (-0.005, 0.005),
            "compact": (0.008, 0.009),
            "minimal": (0.006, 0.009),
            "lean": (0.002, 0.013),
            "leanest": (0.001, 0.014),
        }
    )
    beside = MappingProxyType({"leanest": {"mode": "mixed"}})

    lr: NonNegative = 6e-4
    betas: tuple[Beta, Beta, SecondBeta] = (0.9, 0.95, 0.95)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.1
    total_steps: int | None = Field(default=None, ge=1, strict=True)
    alpha: Setting = "linear"
    component_scales: Scales = None
    mode: Literal["dual", "mixed", "single"] = "dual"

    @field_validator("alpha", mode="before")
    @classmethod
    def _check_alpha(cls, value: Any) -> Setting:
        return check_setting(value, "alpha", words=(AGREEMENT,))

    @field_validator("mode")
    @classmethod
    def _check_mode(cls, value: str, info: ValidationInfo) -> str:
        if value != "dual" and info.data.get("alpha") == AGREEMENT:
            raise ValueError(f"must be 'dual' with alpha {AGREEMENT!r}, which compares two momenta")
        return value

    def check_ready(self) -> None:
        super().check_ready()
        if moves(self.alpha) and self.alpha != AGREEMENT and self.total_steps is None:
            raise UserError(
                f"AMCS: total_steps is required because alpha={self.alpha!r} moves over the training; give "
                "total_steps (toolkit.initialize fills it in from the run) or a constant alpha"
            )

    def alpha_at(self, t: int) -> float:
        """a(t) for optimizer step t = 1, 2, ...; after `total_steps` it holds its last value."""
        return value_at(self.alpha, t, self.total_steps)

    @classmethod
    def variant(cls, settings: Mapping[str, Any], **group: Any) -> type[Rule]:
        if settings.get("mode") == "single":
            return AMCSSingleDynamicRule if cls.is_dynamic(settings) else AMCSSingleRule
        if settings.get("mode") == "mixed":
            return AMCSMixedDynamicRule if cls.is_dynamic(settings) else AMCSMixedRule
        if settings.get("alpha") == AGREEMENT:
            return AMCSAgreementDynamicRule if cls.is_dynamic(settings) else AMCSAgreementRule
        return AMCSDynamicRule if cls.is_dynamic(settings) else AMCSRule

    def mixture(self, t: int) -> dict[str, float]:
        """What both momenta are multiplied by, and whatever else they are mixed with."""
        b_fast, b_slow, _ = self.betas
        alpha = self.alpha_at(t)
        return {"fast_weight": alpha / (1.0 - b_fast**t), "slow_weight": (1.0 - alpha) / (1.0 - b_slow**t)}

    def scalars(self, t: int) -> dict[str, float]:
        b_fast, b_slow, b_v = self.betas
        return {
            "lr": self.lr,
            "decay": self.lr * self.weight_decay,
            "eps": self.eps,
            "fast_rate": 1.0 - b_fast,
            "slow_rate": 1.0 - b_slow,
            "v_rate": 1.0 - b_v,
            **self.mixture(t),
            "v_correction": (1.0 - b_v**t) ** -0.5,
        }

    @staticmethod
    def direction(g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        m_fast, m_slow, v = states
        m_fast = m_fast + s["fast_rate"] * (g - m_fast)
        m_slow = m_slow + s["slow_rate"] * (g - m_slow)
        v = v + s["v_rate"] * (g * g - v)
        m = s["fast_weight"] * m_fast + s["slow_weight"] * m_slow
        return m / (v.sqrt() * s["v_correction"] + s["eps"]), m_fast, m_slow, v  # the code of v takes the same root

    def report(self, t: int) -> dict[str, float]:
        return {"alpha": self.alpha_at(t)} | super().report(t)


class AMCSMixedRule(AMCSRule):
    """AMCS that keeps the mixture of both momenta that the update takes, and how far they are from each other.

    ::

        w_f    =  a(t) / (1 - b_f^t),   w_s = (1 - a(t)) / (1 - b_s^t),   p(t) = w_f / (w_f + w_s)
        m      =  p(t) m_fast + (1 - p(t)) m_slow,     m_far = m + d,     d = m_fast - m_slow
        m_fast =  m + (1 - p(t - 1)) d,                m_slow = m - p(t - 1) d               (before step t)

    All else is AMCS. Formats that keep differences keep d. The update is made of m alone, and what rounding does to d
    gets into later ones only by p (1 - p) times the difference of both betas, so that few bits will do. p follows from
    the step and the settings: where those of a(t) change in between, both momenta move by the change of p times d, and
    m does not.
    """

    states: ClassVar[tuple[State, ...]] = (State("m_far", residual_of="m"), State("m"), State("v", signed=False))
    update_error = MappingProxyType({})
    loss_price = MappingProxyType({})

    def scalars(self, t: int) -> dict[str, float]:
        before = self.mixture(max(t - 1, 1))  # there is nothing to take apart before the first step
        return super().scalars(t) | {"share": before["fast_weight"] / sum(before.values())}

    @staticmethod
    def direction(g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        far, m, v = states
        d = far - m
        m_fast, m_slow = m + (1.0 - s["share"]) * d, m - s["share"] * d
        direction, m_fast, m_slow, v = AMCSRule.direction(g, m_fast, m_slow, v, **s)
        mixed = s["fast_weight"] * m_fast + s["slow_weight"] * m_slow
        m = mixed / (s["fast_weight"] + s["slow_weight"])
        return direction, m + (m_fast - m_slow), m, v


class AMCSSingleRule(AMCSRule):
    """AMCS, approximated by one momentum: AdamW whose first beta moves from b_f to b_s as a(t) moves from 1 to 0.

    ::

        b(t)  =  a(t) b_f + (1 - a(t)) b_s
        m     <- b(t) m + (1 - b(t)) g
        theta <- theta - eta_c wd theta - eta_c (m / (1 - b(1) ... b(t))) / (sqrt(v / (1 - b_v^t)) + eps)

    Both momenta of AMCS average the same gradients, so their mixture is close to one such average (`docs/`). Where
    a(t) is 1 or 0 throughout, it is AMCS.
    """

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v", signed=False))

    def beta_at(self, t: int) -> float:
        """b(t)."""
        b_fast, b_slow, _ = self.betas
        return between(b_fast, b_slow, self.alpha, t, self.total_steps)

    def scalars(self, t: int) -> dict[str, float]:
        b_fast, b_slow, _ = self.betas
        left = product_between(b_fast, b_slow, self.alpha, t, self.total_steps)  # b(1) ... b(t)
        return {
            "lr": self.lr / (1.0 - left),
            "decay": self.lr * self.weight_decay,
            "eps": self.eps,
            "m_rate": 1.0 - self.beta_at(t),
            "v_rate": 1.0 - self.betas[2],
            "v_correction": (1.0 - self.betas[2] ** t) ** -0.5,
        }

    @staticmethod
    def direction(g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        m, v = states
        m = m + s["m_rate"] * (g - m)
        v = v + s["v_rate"] * (g * g - v)
        return m / (v.sqrt() * s["v_correction"] + s["eps"]), m, v  # the code of v takes the same root

    def report(self, t: int) -> dict[str, float]:
        return super().report(t) | {"beta": self.beta_at(t)}


class AMCSAgreementRule(AMCSRule):
    """AMCS with `alpha` "agreement": a(t) follows how far both momenta point the same way.

    ::

        c    =  mean(m_fast m_slow) / sqrt(mean(m_fast^2) mean(m_slow^2))                 over the whole model
        c_0  =  S(b_f b_s) / sqrt(S(b_f^2) S(b_s^2)),    S(x) = (1 - x^t) / (1 - x)
        a(t) =  min(max((c - c_0) / (1 - c_0), 0), 1)

    c_0 is the c of gradients that are nothing but noise, independent from step to step: then a(t) is 0, and all weight
    is on the momentum that averages longer. Gradients that stay the same give c = 1 and a(t) = 1. a(1) is 1.
    """

    statistics: ClassVar[tuple[Mean | Matrix, ...]] = (
        Mean("fast_slow", over="model", by="compare"),
        Mean("fast2", over="model", by="compare"),
        Mean("slow2", over="model", by="compare"),
    )

    def mixture(self, t: int) -> dict[str, float]:
        b_fast, b_slow, _ = self.betas
        room = 1.0 - noise_agreement(b_fast, b_slow, t)
        return {
            "fast_weight": 1.0 / (1.0 - b_fast**t),
            "slow_weight": 1.0 / (1.0 - b_slow**t),
            "per_room": 1.0 / room if room > 1e-9 else 0.0,  # where noise agrees too, as at first, c says nothing
        }

    @staticmethod
    def compare(theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        m_fast, m_slow, _ = states
        m_fast = m_fast + s["fast_rate"] * (g - m_fast)
        m_slow = m_slow + s["slow_rate"] * (g - m_slow)
        return m_fast * m_slow, m_fast * m_fast, m_slow * m_slow

    @classmethod
    def direction(cls, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        a = agreement(**s)
        weights = {"fast_weight": a * s["fast_weight"], "slow_weight": (1.0 - a) * s["slow_weight"]}
        return super().direction(g, *states, **(s | weights))

    def report(self, t: int) -> dict[str, float]:
        return ScaledRule.report(self, t)

    def report_found(self, t: int, component: str, **found: Tensor) -> dict[str, float]:
        per_room = torch.tensor(self.mixture(t)["per_room"])
        return {"alpha": float(agreement(per_room=per_room, **found))} | super().report_found(t, component, **found)


def noise_agreement(b_fast: float, b_slow: float, t: int) -> float:
    """c_0: the cosine between both averages of t independent gradients, that of their impulse responses."""

    def dot(x: float) -> float:
        return (1.0 - x**t) / (1.0 - x)

    return dot(b_fast * b_slow) / math.sqrt(dot(b_fast**2) * dot(b_slow**2))


def agreement(*, per_room: Tensor, fast_slow: Tensor, fast2: Tensor, slow2: Tensor, **_: Tensor) -> Tensor:
    """a(t); `per_room`: 1 / (1 - c_0)."""
    size = fast2.sqrt() * slow2.sqrt()
    cosine = torch.where(size > 0, fast_slow / size, 1.0)
    return (1.0 - per_room * (1.0 - cosine)).clamp(0.0, 1.0)


class AMCSDynamicRule(DynamicScales, AMCSRule):
    """AMCS with `component_scales` "dynamic"."""

    states = (*AMCSRule.states, DynamicScales.LOG_SCALE)


class AMCSAgreementDynamicRule(DynamicScales, AMCSAgreementRule):
    """Both: a(t) is found first, and what is measured of updates is of those with it."""

    states = (*AMCSRule.states, DynamicScales.LOG_SCALE)
    statistics: ClassVar[tuple[Mean | Matrix, ...]] = (*AMCSAgreementRule.statistics, *DynamicScales.statistics)


class AMCSMixedDynamicRule(DynamicScales, AMCSMixedRule):
    """Both."""

    states = (*AMCSMixedRule.states, DynamicScales.LOG_SCALE)


class AMCSSingleDynamicRule(DynamicScales, AMCSSingleRule):
    """Both."""

    states = (*AMCSSingleRule.states, DynamicScales.LOG_SCALE)


AMCS = as_optimizer(AMCSRule)
