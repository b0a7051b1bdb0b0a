"""AdamW's step, for the rule that is AdamW and for rules that are AdamW in a part of the model."""

from __future__ import annotations

from torch import Tensor

from toolkit.state.layout import State

STATES = (State("m"), State("v", signed=False))


def scalars(t: int, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> dict[str, float]:
    """What the functions below need at step `t`."""
    b1, b2 = betas
    return {
        "lr": lr,
        "decay": lr * weight_decay,
        "eps": eps,
        "m_rate": 1.0 - b1,
        "v_rate": 1.0 - b2,
        "m_correction": 1.0 / (1.0 - b1**t),
        "v_correction": (1.0 - b2**t) ** -0.5,
    }


def direction(g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
    """The update without rate and weight decay, and the new m and v."""
    m, v = states
    m = m + s["m_rate"] * (g - m)
    v = v + s["v_rate"] * (g * g - v)
    return s["m_correction"] * m / (v.sqrt() * s["v_correction"] + s["eps"]), m, v  # v's code takes the same root


def update(theta: Tensor, g: Tensor, *states: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
    """One step: the new weights, m and v."""
    step, m, v = direction(g, *states, **s)
    return theta - (s["decay"] * theta + s["lr"] * step), m, v
