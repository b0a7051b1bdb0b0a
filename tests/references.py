"""Rules once more, in float64 and from the papers' equations, for parameters that are whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Update = Callable[[Array, Array, int], Array]
"""New weights from weights, gradient and step; keeps its state."""

ADEMAMIX_STEPS = 6
"""Of AdEMAMix's warm-ups."""

AMCS_STEPS = 6
"""In which AMCS's blend moves from the fast momentum to the slow one."""


def adam_direction(b1: float, b2: float, eps: float) -> Callable[[Array, int], Array]:
    m, v = np.zeros(1), np.zeros(1)

    def direction(g: Array, t: int) -> Array:
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)

    return direction


def adamw(lr: float, decay: float) -> Update:
    direction = adam_direction(0.9, 0.95, 1e-8)
    return lambda theta, g, t: theta - lr * decay * theta - lr * direction(g, t)


def factored_adamw(lr: float, decay: float) -> Update:
    """AdamW whose second moment is kept by rows and columns between steps, of what has more than one dimension."""
    m, v = np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m, v
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        moved: Array = theta - lr * decay * theta - lr * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        if g.ndim > 1:
            grid = v.reshape(-1, g.shape[-1]) if g.ndim == 3 else v.reshape(g.shape[0], -1)
            v = (grid.mean(1)[:, None] * grid.mean(0) / grid.mean()).reshape(g.shape)
        return moved

    return update


def amcs(lr: float, decay: float, gamma: float = 1.0) -> Update:
    fast, slow, v = np.zeros(1), np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal fast, slow, v
        fast, slow, v = 0.9 * fast + 0.1 * g, 0.95 * slow + 0.05 * g, 0.95 * v + 0.05 * g**2
        a = max(0.0, 1 - (t - 1) / (AMCS_STEPS - 1))
        m = a * fast / (1 - 0.9**t) + (1 - a) * slow / (1 - 0.95**t)
        return theta - gamma * lr * (decay * theta + m / (np.sqrt(v / (1 - 0.95**t)) + 1e-8))

    return update


def soam(lr: float, decay: float, ffn: bool = False, max_update: float = np.inf) -> Update:
    b1, eta = (0.95, 1.875 * lr) if ffn else (0.9, lr)
    m, v = np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * g, 0.95 * v + 0.05 * g**2
        u = m / (1 - b1**t) / np.sqrt(v / (1 - 0.95**t) + 1e-8)
        most = max_update * max(np.sqrt(np.mean(theta**2)), 1e-3)
        k = min(1.0, most / (eta * np.sqrt(np.mean(u**2))))
        return theta - eta * decay * theta - k * eta * u

    return update


def lamb(lr: float, decay: float) -> Update:
    direction = adam_direction(0.9, 0.999, 1e-6)

    def update(theta: Array, g: Array, t: int) -> Array:
        u = direction(g, t) + decay * theta
        trust = np.linalg.norm(theta) / np.linalg.norm(u)
        return theta - lr * np.clip(trust, 0.01, 10.0) * u

    return update


def lion(lr: float, decay: float) -> Update:
    m = np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m
        new = theta - lr * (np.sign(0.9 * m + 0.1 * g) + decay * theta)
        m = 0.99 * m + 0.01 * g
        return new

    return update


def qhadam(lr: float, decay: float) -> Update:
    m, v = np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m, v
        m, v = 0.995 * m + 0.005 * g, 0.999 * v + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.995**t), v / (1 - 0.999**t)
        return theta - lr * decay * theta - lr * (0.3 * g + 0.7 * m_hat) / (np.sqrt(v_hat) + 1e-8)

    return update


def ademamix(lr: float, decay: float) -> Update:
    m1, m2, v = np.zeros(1), np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m1, m2, v
        done = t / ADEMAMIX_STEPS
        # The paper's schedule has the half-life of the average move in a straight line.
        low, high = -np.log(2) / np.log(0.9), -np.log(2) / np.log(0.9999)
        b3 = 0.5 ** (1 / ((1 - done) * low + done * high)) if done < 1 else 0.9999
        m1, m2, v = 0.9 * m1 + 0.1 * g, b3 * m2 + (1 - b3) * g, 0.999 * v + 0.001 * g**2
        m = m1 / (1 - 0.9**t) + 8.0 * min(1.0, done) * m2
        return theta - lr * (m / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * theta)

    return update


def stableadamw(lr: float, decay: float) -> Update:
    m, v = np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m, v
        b1 = 0.9 * (1 - 0.9 ** (t - 1)) / (1 - 0.9**t)
        b2 = 0.99 * (1 - 0.99 ** (t - 1)) / (1 - 0.99**t)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(v, 1e-12)))
        return theta - lr / max(1.0, rms) * (decay * theta + m / (np.sqrt(v) + 1e-6))

    return update


def adafactor(lr: float, decay: float) -> Update:
    r, c = np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal r, c
        b2 = 1 - t**-0.8
        square = g**2 + 1e-30
        if g.ndim == 1:
            c = b2 * c + (1 - b2) * square
            v = c
        else:
            square = np.concatenate(matrices(square))
            r = b2 * r + (1 - b2) * square.sum(1)
            c = b2 * c + (1 - b2) * square.sum(0)
            v = (np.outer(r, c) / r.sum()).reshape(g.shape)
        u = g / np.sqrt(v)
        alpha = max(1e-3, np.sqrt(np.mean(theta**2))) * min(lr, 1 / np.sqrt(t))
        return theta - lr * decay * theta - alpha * u / max(1.0, np.sqrt(np.mean(u**2)))

    return update


def matrices(x: Array) -> Array:
    """A stack of matrices, which three dimensions are; what has another number of them is a stack of one."""
    return x if x.ndim == 3 else x.reshape(1, len(x), -1)


def newton_schulz(d: Array) -> Array:
    """Muon's five steps for each matrix, on singular values alone, so as to share nothing with the rules but their
    polynomial."""
    made = []
    for matrix in matrices(d):
        u, values, w = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        made.append((u * values) @ w)
    return np.stack(made)


def of_hidden(lr: float, decay: float, hidden: bool, change: Callable[[Array], Array]) -> Update:
    """`change(g)` for hidden matrices, AdamW for all else."""
    adam = adam_direction(0.9, 0.95, 1e-8)

    def update(theta: Array, g: Array, t: int) -> Array:
        matrix = g.ndim > 1 and hidden
        return theta - lr * decay * theta - lr * (change(g).reshape(g.shape) if matrix else adam(g, t))

    return update


def muon(lr: float, decay: float, hidden: bool = True) -> Update:
    m = np.zeros(1)

    def change(g: Array) -> Array:
        nonlocal m
        m = 0.95 * m + 0.05 * g
        o = newton_schulz(0.95 * m + 0.05 * g)
        made: Array = 0.2 * np.sqrt(max(o.shape[1:])) * o
        return made

    return of_hidden(lr, decay, hidden, change)


def at_rms(u: Array) -> Array:
    """`u` with an rms of 0.2."""
    made: Array = 0.2 * np.sqrt(u.size) / np.linalg.norm(u) * u
    return made


def normuon(lr: float, decay: float, hidden: bool = True) -> Update:
    m, v = np.zeros(1), np.zeros(1)

    def change(g: Array) -> Array:
        nonlocal m, v
        m = 0.95 * m + 0.05 * g
        o = newton_schulz(m)
        v = 0.95 * v + 0.05 * np.mean(o**2, axis=-1)
        return at_rms(o / (np.sqrt(v) + 1e-10)[..., None])

    return of_hidden(lr, decay, hidden, change)


def adamuon(lr: float, decay: float, hidden: bool = True) -> Update:
    m, v = np.zeros(1), np.zeros(1)

    def change(g: Array) -> Array:
        nonlocal m, v
        m = 0.95 * m + g
        o = newton_schulz(np.sign(m))
        v = 0.95 * v + 0.05 * o**2
        return at_rms(o / (np.sqrt(v) + 1e-8))

    return of_hidden(lr, decay, hidden, change)


def sinkgd(lr: float, decay: float, hidden: bool = True) -> Update:
    def change(g: Array) -> Array:
        x = matrices(g)
        for _ in range(5):
            x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
            x = x / np.sqrt(np.mean(x**2, axis=-2, keepdims=True))
        return 0.2 * x

    return of_hidden(lr, decay, hidden, change)


def scale(lr: float, decay: float, head: bool = False, lookup: bool = False) -> Update:
    m, adam = np.zeros(1), adam_direction(0.9, 0.95, 1e-8)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m
        if g.ndim == 1:
            return theta - lr * decay * theta - lr * adam(g, t)
        m = 0.9 * m + 0.1 * g if head else g
        x = np.concatenate(matrices(m))
        x = x / np.sqrt(np.mean(x**2, axis=0 if lookup else 1, keepdims=True))
        return theta - lr * decay * theta - lr * 0.2 * x.reshape(g.shape)

    return update


def lomo(lr: float, decay: float) -> Update:
    return lambda theta, g, t: theta - lr * (g + decay * theta)


FACTORED, BOUNDED = "AdamW8, factored", "SOAM, bounded"
"""Stand for a rule with a state format, and for one with `max_update`."""

REFERENCES: dict[str, Callable[..., Update]] = {
    "AMCS": amcs,
    "SOAM": soam,
    "AdamW8": adamw,
    "Lion8": lion,
    "QHAdam": qhadam,
    "AdEMAMix": ademamix,
    "StableAdamW": stableadamw,
    "Lamb8": lamb,
    "Adafactor8": adafactor,
    "Muon8": muon,
    "NorMuon": normuon,
    "AdaMuon": adamuon,
    "SinkGD": sinkgd,
    "SCALE": scale,
    "LOMO": lomo,
    "Lion": lion,
}

HIDDEN = ("attention", "ffn", "other")

SETTINGS: dict[str, dict[str, float]] = {
    "AdEMAMix": {"total_steps": ADEMAMIX_STEPS},
    "AMCS": {"total_steps": AMCS_STEPS},
    BOUNDED: {"max_update": 8e-3},
}
"""Hyper-parameters, beside rate and decay, that a reference does not have as the rule's defaults."""


def follow(
    name: str, lr: float, decay: float, start: Array, gradients: Sequence[Array], component: str = "other"
) -> Array:
    """One parameter of this component after steps on these gradients."""
    hidden = {"hidden": component in HIDDEN}
    kinds = dict.fromkeys(("Muon8", "NorMuon", "AdaMuon", "SinkGD"), hidden)
    kinds["SCALE"] = {"head": component == "head", "lookup": component == "embedding"}
    ffn = {"ffn": component == "ffn"}
    numbers = {
        "AMCS": {"gamma": {"attention": 1.2, "embedding": 0.8, "head": 0.8}.get(component, 1.0)},
        "SOAM": ffn,
        BOUNDED: ffn | SETTINGS[BOUNDED],
    }
    made = (REFERENCES | {FACTORED: factored_adamw, BOUNDED: soam})[name]
    update, theta = made(lr, decay, **(kinds | numbers).get(name, {})), start.astype(np.float64)
    for t, gradient in enumerate(gradients, 1):
        theta = update(theta, gradient.astype(np.float64), t)
    return theta
