"""The plug-ins' rules once more, in float64 and from the papers' equations, for parameters that are whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Update = Callable[[Array, Array, int], Array]
"""New weights from weights, gradient and step; keeps its state."""


def lion(lr: float) -> Update:
    m = np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m
        new = theta - lr * np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        return new

    return update


def qhadam(lr: float) -> Update:
    m, v = np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m, v
        m, v = 0.995 * m + 0.005 * g, 0.999 * v + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.995**t), v / (1 - 0.999**t)
        return theta - lr * (0.3 * g + 0.7 * m_hat) / (np.sqrt(v_hat) + 1e-8)

    return update


def stableadamw(lr: float) -> Update:
    m, v = np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m, v
        b1 = 0.9 * (1 - 0.9 ** (t - 1)) / (1 - 0.9**t)
        b2 = 0.99 * (1 - 0.99 ** (t - 1)) / (1 - 0.99**t)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(v, 1e-12)))
        return theta - lr / max(1.0, rms) * m / (np.sqrt(v) + 1e-6)

    return update


def adafactor(lr: float) -> Update:
    r, c = np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal r, c
        b2 = 1 - t**-0.8
        square = g**2 + 1e-30
        if g.ndim == 1:
            c = b2 * c + (1 - b2) * square
            v = c
        else:
            square = square.reshape(len(g), -1)
            r = b2 * r + (1 - b2) * square.sum(1)
            c = b2 * c + (1 - b2) * square.sum(0)
            v = (np.outer(r, c) / r.sum()).reshape(g.shape)
        u = g / np.sqrt(v)
        alpha = max(1e-3, np.sqrt(np.mean(theta**2))) * min(lr, 1 / np.sqrt(t))
        return theta - alpha * u / max(1.0, np.sqrt(np.mean(u**2)))

    return update


def muon(lr: float, decay: float = 0.1, hidden: bool = True) -> Update:
    m, v = np.zeros(1), np.zeros(1)

    def update(theta: Array, g: Array, t: int) -> Array:
        nonlocal m, v
        if g.ndim == 1 or not hidden:
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            return theta - lr * decay * theta - lr * step
        m = 0.95 * m + 0.05 * g
        d = 0.95 * m + 0.05 * g
        matrix = d.reshape(len(d), -1)
        rows, columns = matrix.shape
        # On singular values alone, so as to share nothing with the plug-in but its polynomial.
        u, values, w = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        o = ((u * values) @ w).reshape(d.shape)
        return theta - lr * decay * theta - lr * np.sqrt(max(1.0, rows / columns)) * o

    return update


REFERENCES: dict[str, Callable[..., Update]] = {
    "Lion": lion,
    "QHAdam": qhadam,
    "StableAdamW": stableadamw,
    "Adafactor": adafactor,
    "Muon": muon,
}


def follow(name: str, lr: float, start: Array, gradients: Sequence[Array], **options: float) -> Array:
    """One parameter after steps on these gradients."""
    update, theta = REFERENCES[name](lr, **options), start.astype(np.float64)
    for t, gradient in enumerate(gradients, 1):
        theta = update(theta, gradient.astype(np.float64), t)
    return theta
