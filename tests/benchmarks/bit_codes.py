"""Codes of 8 bits without roots: what their error is beside the shipped ones.

    python tests/benchmarks/bit_codes.py [--hidden 128] [--steps 60]

A code is made of the bits of z = |x| / max|x| + c, whose distance from the bits of c is about the logarithm of z / c:
linear near zero, logarithmic above, and zero is exact. Nothing here takes a root. Options and figures are those of
`codec_error.py`, for AMCS: each row has other codes for both momenta or for v, and the shipped ones for the rest.
"""

from __future__ import annotations

import sys

import codec_error
import torch
from torch import Tensor

from toolkit.state.codecs import FORMATS, Format, Root, Scale, Signed


def bits(x: float) -> int:
    """Of fp32."""
    return int(torch.tensor(x).view(torch.int32))


def reach(c: float) -> int:
    """How many patterns there are from c to 1 + c."""
    return bits(1.0 + c) - bits(c)


def least(codes: int, mantissa: int) -> float:
    """The smallest c for which `codes` codes with `mantissa` bits of mantissa reach 1 + c."""
    below, above = 1e-8, 0.5
    for _ in range(60):
        middle = (below * above) ** 0.5
        below, above = (below, middle) if reach(middle) <= codes << (23 - mantissa) else (middle, above)
    return above


class Curve:
    """A share y of the largest, 0 to 1, to a place in 0 to 1, and back: piecewise linear, without a root."""

    def __init__(self, c: float) -> None:
        self.c = c

    def place(self, y: Tensor) -> Tensor:
        return ((y + self.c).view(torch.int32) - bits(self.c)).float() / reach(self.c)

    def share(self, place: Tensor) -> Tensor:
        return ((place * reach(self.c)).to(torch.int32) + bits(self.c)).view(torch.float32) - self.c


class Halved(Curve):
    """Half the bits, or a quarter: a straight line between the roots of every other power of 2."""

    def __init__(self, c: float, halvings: int) -> None:
        super().__init__(c)
        self.halvings = halvings
        self.offset = bits(1.0) - (bits(1.0) >> halvings)
        first, last = (float(self._root(torch.tensor([x]))) for x in (c, 1.0 + c))
        self.first, self.length = first, last - first

    def _root(self, z: Tensor) -> Tensor:
        return ((z.view(torch.int32) >> self.halvings) + self.offset).view(torch.float32)

    def place(self, y: Tensor) -> Tensor:
        return (self._root(y + self.c) - self.first) / self.length

    def share(self, place: Tensor) -> Tensor:
        root = place * self.length + self.first
        return ((root.view(torch.int32) - self.offset) << self.halvings).view(torch.float32) - self.c


class Momentum(Signed):
    """Codes -127 to 127."""

    def __init__(self, name: str, curve: Curve) -> None:
        super().__init__(8)
        self.name, self.curve = name, curve

    def encode(self, x: Tensor, scale: Scale, dither: Tensor) -> Tensor:
        place = self.curve.place(x.abs() * scale.inverse)
        return ((self.largest * place + dither).clamp(max=self.largest).trunc() * x.sign()).to(self.dtype)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return self.curve.share(codes.float().abs() / self.largest) * codes.float().sign() * scale


class Second(Root):
    """Codes 1 to 255."""

    def __init__(self, name: str, curve: Curve) -> None:
        super().__init__(8)
        self.name, self.curve = name, curve

    def scale_of(self, largest: Tensor) -> Tensor:
        return largest

    def encode(self, x: Tensor, scale: Scale, dither: Tensor) -> Tensor:
        place = self.curve.place(x * scale.inverse)
        return (self.largest * place + dither).clamp(min=1.0, max=self.largest).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return self.curve.share(codes.float() / self.largest) * scale


MOMENTA: dict[str, Curve] = {
    **{f"momenta, {2**k} codes an octave": Curve(least(127, k)) for k in (4, 5)},
    **{f"momenta, c = 2^-{k}": Curve(2.0**-k) for k in (5, 6, 7)},
    **{f"momenta, half the bits, c = 2^-{k}": Halved(2.0**-k, 1) for k in (8, 10, 12)},
}
SECOND: dict[str, Curve] = {
    **{f"v, {2**k} codes an octave": Curve(least(255, k)) for k in (4, 5)},
    **{f"v, c = 2^-{k}": Curve(2.0**-k) for k in (10, 12, 14, 20)},
    **{f"v, a quarter of the bits, c = 2^-{k}": Halved(2.0**-k, 2) for k in (16, 20, 24, 28)},
    **{f"v, half the bits, c = 2^-{k}": Halved(2.0**-k, 1) for k in (12, 16)},
}
ROWS = {
    **{name: Format(Momentum(name, curve), Root(8)) for name, curve in MOMENTA.items()},
    **{name: Format(Signed(8), Second(name, curve)) for name, curve in SECOND.items()},
}

if __name__ == "__main__":
    FORMATS.update(ROWS)
    codec_error.SHIPPED = ("8bit", *ROWS)
    sys.argv += ["--rules", "AMCS"]
    codec_error.main()
