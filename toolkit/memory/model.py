"""Model state and its transients, in bytes on one rank: the formulas of docs/memory-model.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.optim.layout import Layout
from toolkit.state.codecs import BLOCK

BF16 = 2


@dataclass(frozen=True)
class Buckets:
    """Sizes of zero_optimization, in elements."""

    reduce: int
    prefetch: int = 0
    live: int = 0


Shapes = Sequence[Sequence[int]]


def resident(shapes: Shapes, matrix: Layout, vector: Layout, *, stage: int, world_size: int) -> dict[str, float]:
    """Bytes by category between steps, on one rank of `world_size`, for bf16 weights without master weights.

    Args:
        shapes: of every trained parameter, tied ones once.
        matrix, vector: what is stored for parameters of two dimensions and more, and for all others.
        stage: of ZeRO, 1 to 3.
    """
    held: dict[str, float] = {"weights": 0.0}
    for shape in shapes:
        numel = math.prod(shape)
        # At stage 3 a matrix is padded to whole blocks on every rank, at stages 1 and 2 a whole group is.
        padded = numel + (-numel % (BLOCK * world_size) if stage == 3 and len(shape) > 1 else 0)
        held["weights"] += BF16 * (padded / world_size if stage == 3 else numel)
        for name, size in (matrix if len(shape) > 1 else vector).bytes_per_element().items():
            held[name] = held.get(name, 0.0) + size * padded / world_size
    if stage == 3:
        held["gradients"] = held["weights"]
    return held


def peak(
    shapes: Shapes,
    matrix: Layout,
    vector: Layout,
    *,
    stage: int,
    world_size: int,
    buckets: Buckets,
    released: bool = False,
) -> dict[str, float]:
    """Bytes by category at the peak of a training step, activations aside; arguments as of `resident`.

    The peak lies in the backward pass, where the largest gradient meets all others.
    """
    held = resident(shapes, matrix, vector, stage=stage, world_size=world_size)
    sizes = sorted((math.prod(shape) for shape in shapes), reverse=True)
    largest, share = BF16 * sizes[0], BF16 * sum(sizes) / world_size
    alone, bucket = world_size == 1, min(buckets.reduce, sum(sizes))
    if stage < 3:
        small = BF16 * sum(math.prod(shape) for shape in shapes if len(shape) < 2) / world_size
        held["gradients"] = small if released else share
        if alone:
            # Autograd's own gradients are the ones that are kept.
            held["transients"] = largest if released else 0.0
        else:
            # The whole of the largest gradient beside what this rank keeps, which holds its part of it already;
            # or a bucket that waits and a copy of it.
            held["transients"] = max(largest + (largest / world_size if released else 0.0), 2 * BF16 * bucket)
        return held
    held["buckets"] = float(BF16 * buckets.reduce)
    # Vocabulary matrices at both ends are whole for a moment, beside what may stay gathered and is fetched ahead.
    gathered = min(sum(sizes), sizes[0] + (sizes[1] if len(sizes) > 1 else 0) + buckets.live + buckets.prefetch)
    held["transients"] = largest if alone else float(BF16 * (gathered + bucket))
    return held


def per_parameter(held: Mapping[str, float], shapes: Shapes) -> float:
    """All categories together, in bytes per parameter of the whole model."""
    return sum(held.values()) / sum(math.prod(shape) for shape in shapes)
