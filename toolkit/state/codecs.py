"""Codecs: how a state tensor is held in memory.

A state is cut into blocks of `BLOCK` fp32 values. A codec says how one value is coded, given its block's scale; the
block maximum, the packing of 4-bit codes two to a byte and the writing in place are done once, here and in
`toolkit.optim.kernel`, for all codecs. It is pure elementwise tensor code without branches on data, so the same source
runs eagerly and inside the compiled optimizer step. To add a codec, write one class here and name it in `FORMATS`;
optimizers, ZeRO sharding and byte accounting read everything from it.

Scales are fp32. With fp16 scales the update is 4 % wrong at a gradient rms of 1e-6 and useless at 1e-8, and
gradients of large models do get there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share one scale. Shards are whole blocks, so a block never spans two ranks."""

_TINY = torch.finfo(torch.float32).tiny
_SIGN = torch.iinfo(torch.int32).min  # the bit of a float
_LARGEST_ROOT = 2.0**32 * (1.0 - 2.0**-22)  # its fourth power is finite, however a device rounds roots
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill an interval most evenly


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor: shape [blocks, `per_block`], `dtype`; `suffix` completes its state key."""

    suffix: str
    dtype: torch.dtype
    per_block: int

    @property
    def bytes_per_element(self) -> float:
        """Of the state that it is stored for."""
        return self.per_block * self.dtype.itemsize / BLOCK


class Scale(NamedTuple):
    """What a codec knows of a block: its scale and the inverse, fp32 [blocks, 1]."""

    value: Tensor
    inverse: Tensor


class Codec(ABC):
    """How one value of a block is coded. Tensors are fp32 [blocks, w], w lanes of each block.

    `dtype` is that of a code. `bits` below 8 are those of codes from 0 on, in uint8, several of which are stored in a
    byte; else it is the width of `dtype`. A codec that is `relative` codes the difference to the state that its state
    is a residual of.
    """

    name: str
    dtype: torch.dtype
    bits: int
    scaled: bool = True
    relative: bool = False

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name

    def measure(self, x: Tensor) -> Tensor:
        """Non-negative; a block's scale is made of its largest value in the block."""
        return x.abs()

    def scale_of(self, largest: Tensor) -> Tensor:
        """The scales of blocks, [blocks, 1], from their largest measures."""
        return largest

    @abstractmethod
    def encode(self, x: Tensor, scale: Scale, dither: Tensor) -> Tensor:
        """Codes of `x`, in `dtype`. `dither`: thresholds in (0, 1), of the shape of `x`, for unbiased rounding."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Codes to fp32; `scale` is `Scale.value`. Codes of zero under a scale of zero decode to zeros."""

    def specs(self) -> tuple[TensorSpec, ...]:
        """The stored tensors: codes, and scales where there are any."""
        codes = TensorSpec("", self.dtype, BLOCK * self.bits // (8 * self.dtype.itemsize))
        return (codes, TensorSpec("scale", torch.float32, 1)) if self.scaled else (codes,)

    def bytes_per_element(self) -> float:
        """Stored bytes per element, scales included."""
        return sum(spec.bytes_per_element for spec in self.specs())


def parts_of(bits: Iterable[int]) -> int:
    """Into how many parts of lanes a block is cut where codes of so many bits are kept: one for each code of a byte."""
    return max([1, *(8 // one for one in bits if 0 < one < 8)])


def encode_halves(codec: Codec, halves: Sequence[Tensor]) -> list[list[Tensor]]:
    """Code whole blocks, given as halves (or quarters) of lanes, fp32 [blocks, w], that make up BLOCK lanes.

    Returns one list for each of `codec.specs()`: the codes of each half (below 8 bits, packed), the scales.
    """
    scale = Scale(halves[0], halves[0])  # not looked at, if it stays
    if codec.scaled:
        size = codec.measure(halves[0])
        for half in halves[1:]:
            size = torch.maximum(size, codec.measure(half))
        scale = _block_scale(codec, size)
    codes, lane = [], 0
    for half in halves:
        dither = _dither(scale.value, lane, half.shape[1]) if codec.scaled else half
        codes.append(codec.encode(half, scale, dither))
        lane += half.shape[1]
    stored = pack(codes, codec.bits) if codec.bits < 8 else codes
    return [stored, [scale.value]] if codec.scaled else [stored]


def decode_halves(codec: Codec, stored: Sequence[Tensor], scale: Sequence[Tensor] = ()) -> list[Tensor]:
    """The inverse of `encode_halves`, as far as the codes go."""
    codes = unpack(stored, codec.bits) if codec.bits < 8 else stored
    return [codec.decode(half, scale[0] if codec.scaled else half) for half in codes]


def pack(codes: Sequence[Tensor], bits: int = 4) -> list[Tensor]:
    """Codes of `bits` bits, by part of lanes [blocks, w], to bytes [blocks, w]: those of the first parts in low bits.

    A byte holds lanes that are as far apart as possible, so that packing is elementwise: of four parts in 4 bits there
    are two tensors of bytes, of the first and the third and of the second and the fourth.
    """
    count = len(codes) * bits // 8
    packed = list(codes[:count])
    for place, code in enumerate(codes[count:]):
        packed[place % count] = packed[place % count] | (code << bits * (1 + place // count))
    return packed


def unpack(packed: Sequence[Tensor], bits: int = 4) -> list[Tensor]:
    """The inverse of `pack`."""
    codes: list[Tensor] = []
    for shift in range(0, 8, bits):
        some = [byte >> shift if shift else byte for byte in packed]
        codes += some if shift + bits == 8 else [code & (2**bits - 1) for code in some]
    return codes


def encode_blocks(codec: Codec, x: Tensor) -> tuple[Tensor, ...]:
    """fp32 [blocks, BLOCK] to one tensor for each of `codec.specs()`."""
    parts = x.split(BLOCK // parts_of([4, codec.bits]), dim=1)
    return tuple(torch.cat(pieces, dim=1) for pieces in encode_halves(codec, parts))


def decode_blocks(codec: Codec, *parts: Tensor) -> Tensor:
    """The tensors of `codec.specs()` to fp32 [blocks, BLOCK]."""
    return torch.cat(decode_halves(codec, *([part] for part in parts)), dim=1)


def _block_scale(codec: Codec, size: Tensor) -> Scale:
    """The scale of each block and its inverse, from the measures of its values.

    A block whose values are all denormal counts as zero: the inverse of its scale would overflow.
    A block that holds an inf or NaN gets NaN as its scale and decodes to NaN: what is not finite never turns
    finite unseen.
    """
    scale = codec.scale_of(_largest(size))
    scale = torch.where(scale < _TINY, 0.0, scale)
    scale = torch.where(scale < torch.inf, scale, torch.nan)
    return Scale(scale, _once(torch.where(scale == 0.0, 0.0, 1.0 / scale)))


def _once(x: Tensor) -> Tensor:
    """`x`, [blocks, 1]. What is compiled for a CPU computes it once for a block, not for each vector of one, since a
    view by strides is one of memory. On a GPU that would be a kernel of its own.
    """
    return x.as_strided(x.shape, x.stride()) if x.device.type == "cpu" else x


def _largest(size: Tensor) -> Tensor:
    """The largest of each block, [blocks, 1], or NaN where there is one.

    Numbers that are not negative have the order of their bits, NaN last; a GPU has instructions for the largest of many
    whole numbers.
    """
    if size.device.type == "cpu":
        return size.amax(dim=1, keepdim=True)
    return size.view(torch.int32).amax(dim=1, keepdim=True).view(torch.float32)


def _signed(size: Tensor, x: Tensor) -> Tensor:
    """`size`, which is less than 1 where `x` is 0, with the sign of `x`: equal once it is cut to a whole number."""
    if x.device.type == "cpu":  # by its bit, two instructions; `copysign` calls a function
        return (size.view(torch.int32) | (x.view(torch.int32) & _SIGN)).view(torch.float32)
    return torch.copysign(size, x)


class Fp32(Codec):
    """No compression."""

    name = "fp32"
    dtype = torch.float32
    bits = 32
    scaled = False

    def encode(self, x: Tensor, scale: Scale, dither: Tensor) -> Tensor:
        return x

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes


class Signed(Codec):
    """Momentum: code = sign(x) c sqrt(|x| / max|x|), rounded down or up so as to be right on average.

    8 bits are int8 with c = 127. 4 bits have c = 7 and are stored as code + 8, 2 bits c = 1 and code + 2; 0 stands for
    zero too.

    The root spends codes near zero, where most of a heavy-tailed block lies: gradients of vocabulary matrices
    and of down projections have columns hundreds of times larger than their neighbours. It is odd, so zero is
    exact, and decoding then encoding gives the same codes. Decode: z |z| max|x| with z = code / c.

    Rounded to the nearest code a small momentum would never decay, while its second moment does: the update of
    an embedding row whose token is not seen any more would grow for ever. In 4 bits the error is that of a coin
    tossed between two codes, right on average.
    """

    def __init__(self, bits: int, *, relative: bool = False) -> None:
        self.name = f"{'residual' if relative else 'signed'}{bits}"
        self.dtype = torch.uint8 if bits < 8 else torch.int8
        self.bits = bits
        self.relative = relative
        self.largest = 2.0 ** (bits - 1) - 1.0
        self._zero = 2.0 ** (bits - 1)

    def encode(self, x: Tensor, scale: Scale, dither: Tensor) -> Tensor:
        code = _signed_root(x, scale, dither, self.largest)
        # Cut towards zero before the sign is lost.
        return (torch.trunc(code) + self._zero if self.bits < 8 else code).to(self.dtype)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        code = codes.to(torch.float32)
        z = (code - self._zero if self.bits < 8 else code) * (1.0 / self.largest)
        return z * z.abs() * scale


def _signed_root(x: Tensor, scale: Scale, dither: Tensor, largest: float) -> Tensor:
    """sign(x) `largest` sqrt(|x| / scale), which cut to a whole number has a square that is right on average.

    Between codes c and c + 1, of squares c^2 and c^2 + 2 c + 1, the square y goes up where it exceeds
    c^2 + d (2 c + 1), d the dither; that is (c + d)^2 + d (1 - d). Solved for c, the code is written with one mention
    of y, which matters: the compiler traces what is mentioned twice twice.
    """
    square = largest * largest * (x.abs() * scale.inverse)
    return _signed(torch.sqrt(torch.relu(square - dither * (1.0 - dither))) + (1.0 - dither), x)


class Root(Codec):
    """Second moment in uint8: code = c (v / max v)^(1/4), rounded down or up by a dither, never below 1.

    8 bits have c = 255, 4 bits c = 15: the least v of a block is a 50,625th of the largest.

    Linear codes for v diverge and square roots lose the small elements of heavy-tailed blocks. A code of zero
    would decode to v = 0 beside a non-zero momentum, an update hundreds of times too large, hence the floor
    at 1. The scale kept is the fourth root of max v, which no float's range can make underflow.

    Rounding to the nearest code would never let a small element decay: 5 % less v is 1.3 % less of its root,
    below half a code for every code under 40. It stays too large, and its weight learns too slowly. Rounding is
    unbiased for the root and not for v: between small codes, 16 times apart in v, that would mean v far too small
    most of the time, and updates far too large.
    """

    dtype = torch.uint8

    def __init__(self, bits: int) -> None:
        self.name = f"root{bits}"
        self.bits = bits
        self.largest = 2.0**bits - 1.0

    def scale_of(self, largest: Tensor) -> Tensor:
        root = torch.sqrt(torch.sqrt(largest))
        return torch.where(root < torch.inf, root.clamp(max=_LARGEST_ROOT), root)

    def encode(self, x: Tensor, scale: Scale, dither: Tensor) -> Tensor:
        root = torch.sqrt(torch.sqrt(x))
        code = self.largest * (root * scale.inverse) + dither
        return code.clamp(min=1.0).to(torch.uint8)  # cut to a whole number

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        square = (codes.to(torch.float32) * (1.0 / self.largest) * scale) ** 2
        return square * square


def _dither(scale: Tensor, first: int, lanes: int) -> Tensor:
    """Thresholds in (0, 1), [blocks, lanes]: evenly spread over a block, shifted by its scale's last bits.

    The scale changes at nearly every step, and with it all thresholds. Depending on nothing but the block, they
    are the same at every world size and after every restart. They keep away from 0 and 1, so that a value that
    is a code already stays that code.
    """
    shift = (scale.view(torch.int32) & 0xFFFF).to(torch.float32) * 2.0**-16
    return spread(shift, first, lanes) * (1.0 - 2.0**-9) + 2.0**-10


def spread(shift: Tensor, first: int, lanes: int) -> Tensor:
    """Numbers in [0, 1), [blocks, lanes]: multiples of the golden ratio by lane, plus the block's `shift`."""
    lane = torch.arange(first, first + lanes, device=shift.device)
    value = _once(shift) + lane * _GOLDEN
    return value - torch.floor(value)


class Format(NamedTuple):
    """The codecs that one name of a format means: for a signed state, a second moment, a residual of another state."""

    signed: Codec
    second: Codec
    residual: Codec | None = None


FORMATS: dict[str, Format] = {
    "fp32": Format(Fp32(), Fp32()),
    "8bit": Format(Signed(8), Root(8)),
    "4bit": Format(Signed(4), Root(4), residual=Signed(4, relative=True)),
    "2bit": Format(Signed(4), Root(4), residual=Signed(2, relative=True)),
}

FACTORED = "factored"
"""The format of a second moment of which means over rows and over columns are kept, and no codes."""

MIXES: dict[str, dict[str, str]] = {
    "lean": {"signed": "4bit", "anchor": "4bit", "residual": "4bit", "second": FACTORED},
    "leanest": {"signed": "4bit", "anchor": "4bit", "residual": "2bit", "second": FACTORED},
    FACTORED: {"signed": "8bit", "anchor": "8bit", "residual": "8bit", "second": FACTORED},
    "compact": {"signed": "4bit", "anchor": "8bit", "residual": "4bit", "second": "8bit"},
    "minimal": {"signed": "4bit", "anchor": "8bit", "residual": "4bit", "second": "4bit"},
}
"""Formats of whole rules: that of each state by its role. "anchor": a state that another is a residual of."""
