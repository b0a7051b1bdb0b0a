"""Rules whose rates have a factor by component that is measured, once more, in float64 and from the equations.

Unlike those of `references.py` they are of a whole model: a component's parameters depend on one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Arrays = dict[str, Array]


def adam(b1: float, b2: float) -> Callable[[Arrays, int], Arrays]:
    """AdamW's direction."""
    m: Arrays = {}
    v: Arrays = {}

    def direction(g: Arrays, t: int) -> Arrays:
        for name, x in g.items():
            m[name] = b1 * m.get(name, 0.0) + (1 - b1) * x
            v[name] = b2 * v.get(name, 0.0) + (1 - b2) * x**2
        return {name: m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + 1e-8) for name in g}

    return direction


def amcs(alpha: Callable[[Arrays, Arrays, int], float]) -> Callable[[Arrays, int], Arrays]:
    """AMCS's direction; `alpha` is given both momenta by name, and the step."""
    b_f, b_s, b_v = 0.9, 0.95, 0.95
    fast: Arrays = {}
    slow: Arrays = {}
    v: Arrays = {}

    def direction(g: Arrays, t: int) -> Arrays:
        for name, x in g.items():
            fast[name] = b_f * fast.get(name, 0.0) + (1 - b_f) * x
            slow[name] = b_s * slow.get(name, 0.0) + (1 - b_s) * x
            v[name] = b_v * v.get(name, 0.0) + (1 - b_v) * x**2
        a = alpha(fast, slow, t)
        found = {}
        for name in g:
            m = a * fast[name] / (1 - b_f**t) + (1 - a) * slow[name] / (1 - b_s**t)
            found[name] = m / (np.sqrt(v[name] / (1 - b_v**t)) + 1e-8)
        return found

    return direction


def agreement(fast: Arrays, slow: Arrays, t: int) -> float:
    """a(t) of AMCS with alpha "agreement", from the momenta and from the impulse responses of their averages."""

    def cosine(x: Array, y: Array) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    both = [np.concatenate([x.ravel() for x in momenta.values()]) for momenta in (fast, slow)]
    noise = cosine(0.9 ** np.arange(t), 0.95 ** np.arange(t))
    return 1.0 if t == 1 else float(np.clip((cosine(*both) - noise) / (1 - noise), 0.0, 1.0))


def rms(values: Sequence[Array]) -> float:
    return float(np.sqrt(np.mean(np.concatenate([x.ravel() for x in values]) ** 2)))


def follow_dynamic(
    direction: Callable[[Arrays, int], Arrays],
    lr: float,
    start: Mapping[str, Array],
    gradients: Sequence[Mapping[str, Array]],
    components: Mapping[str, str],
    decay: Callable[[str], float],
) -> tuple[Arrays, dict[str, float]]:
    """Weights after these gradients, and gamma by component at the last step."""
    theta = {name: x.astype(np.float64) for name, x in start.items()}
    gamma = dict.fromkeys(components.values(), 1.0)
    for t, by_name in enumerate(gradients, 1):
        step = direction({name: x.astype(np.float64) for name, x in by_name.items()}, t)
        whole = rms([*step.values()]) / rms([*theta.values()])
        for component, before in gamma.items():
            own = [name for name in theta if components[name] == component]
            ratio = rms([step[name] for name in own]) / rms([theta[name] for name in own])
            gamma[component] = before**0.98 * np.clip(whole / ratio, 0.5, 2.0) ** 0.02
        for name, x in theta.items():
            theta[name] = x - gamma[components[name]] * lr * (step[name] + decay(name) * x)
    return theta, gamma
