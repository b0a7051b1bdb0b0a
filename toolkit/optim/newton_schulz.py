"""Newton-Schulz iterations: a matrix with all singular values near 1, from products of matrices alone."""

from __future__ import annotations

from torch import Tensor

Coefficients = tuple[tuple[float, float, float], ...]

MUON: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
"""Jordan et al. 2024: five times the same, steep at 0. Singular values of 0.01 to 1 end up in 0.68 to 1.14."""

_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
POLAR_EXPRESS: Coefficients = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS)
"""Amsel et al. 2025, algorithm 1: each the best for singular values from 0.001 on, with their margin of 1 %.
These end up in 0.84 to 1.13."""


def orthogonal(matrix: Tensor, coefficients: Coefficients) -> Tensor:
    """`matrix` with its singular values s replaced by p(...p(s / |matrix|)), where p(s) = a s + b s^3 + c s^5."""
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix  # so that the product below is the small one
    x = x / x.norm().clamp(min=1e-7)
    for a, b, c in coefficients:
        higher = _higher(x, b, c)  # before x changes
        x.mul_(a).add_(higher)
        del higher
    return x.T if rows > columns else x


def _higher(x: Tensor, b: float, c: float) -> Tensor:
    """b s^3 + c s^5; in place where it can be, for what this holds is most of what a step of whole matrices takes."""
    gram = x @ x.T
    fourth = (c * gram) @ gram
    return gram.mul_(b).add_(fourth) @ x
