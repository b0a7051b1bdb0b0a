"""Codecs: how a state tensor is held in memory.

A codec turns blocks of `BLOCK` fp32 values into a few smaller tensors and back. It is pure tensor code without
branches on data, so the same source runs eagerly and inside the compiled optimizer step. To add a codec, write
one class here and name it in `FORMATS`; optimizers, ZeRO sharding and byte accounting read everything from
`parts`.

Scales are fp32. With fp16 scales the update is 4 % wrong at a gradient rms of 1e-6 and useless at 1e-8, and
gradients of large models do get there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share one scale. Shards are whole blocks, so a block never spans two ranks."""

_TINY = torch.finfo(torch.float32).tiny
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill an interval most evenly


@dataclass(frozen=True)
class Part:
    """One stored tensor of a codec: shape [blocks, `per_block`], `dtype`; `suffix` completes its state key."""

    suffix: str
    dtype: torch.dtype
    per_block: int


class Codec(ABC):
    """Blocks of fp32 values, shape [blocks, BLOCK], to `parts` and back."""

    name: ClassVar[str]
    parts: ClassVar[tuple[Part, ...]]

    @staticmethod
    @abstractmethod
    def encode(x: Tensor) -> tuple[Tensor, ...]:
        """fp32 [blocks, BLOCK] to one tensor per entry of `parts`."""

    @staticmethod
    @abstractmethod
    def decode(*parts: Tensor) -> Tensor:
        """The tensors of `parts` to fp32 [blocks, BLOCK]. All-zero parts decode to zeros."""

    @classmethod
    def bytes_per_element(cls) -> float:
        """Stored bytes per element, scales included."""
        return sum(part.per_block * part.dtype.itemsize for part in cls.parts) / BLOCK


class Fp32(Codec):
    """No compression."""

    name = "fp32"
    parts = (Part("", torch.float32, BLOCK),)

    @staticmethod
    def encode(x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    @staticmethod
    def decode(*parts: Tensor) -> Tensor:
        return parts[0]


def _block_scale(size: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of the non-negative values of each block and its inverse, both [blocks, 1].

    A block whose values are all denormal counts as zero: the inverse of its scale would overflow.
    A block that holds an inf or NaN gets NaN as its scale and decodes to NaN: what is not finite never turns
    finite unseen.
    """
    scale = size.amax(dim=1, keepdim=True)
    scale = torch.where(scale < _TINY, 0.0, scale)
    scale = torch.where(scale < torch.inf, scale, torch.nan)
    inverse = torch.where(scale == 0.0, 0.0, 1.0 / scale)
    return scale, inverse


def _defined(codes: Tensor, *, largest: float) -> Tensor:
    """Codes within 0..largest; NaN, from a block that its scale marks as not finite, becomes `largest`."""
    return torch.where(codes <= largest, codes, largest)


class Signed8(Codec):
    """Momentum in int8: code = sign(x) 127 sqrt(|x| / max|x|), rounded down or up so as to be right on average.

    The root spends codes near zero, where most of a heavy-tailed block lies: gradients of vocabulary matrices
    and of down projections have columns hundreds of times larger than their neighbours. It is odd, so zero is
    exact, and decoding then encoding gives the same codes. Decode: z |z| max|x| with z = code / 127.

    Rounded to the nearest code a small momentum would never decay, while its second moment does: the update of
    an embedding row whose token is not seen any more would grow for ever.
    """

    name = "signed8"
    parts = (Part("", torch.int8, BLOCK), Part("scale", torch.float32, 1))

    @staticmethod
    def encode(x: Tensor) -> tuple[Tensor, ...]:
        size = x.abs()
        scale, inverse = _block_scale(size)
        square = 16129.0 * (size * inverse)
        below = torch.floor(torch.sqrt(square))
        up = square - below * below > _dither(scale) * (2.0 * below + 1.0)
        codes = _defined(torch.where(up, below + 1.0, below), largest=127.0)
        return torch.where(x < 0.0, -codes, codes).to(torch.int8), scale

    @staticmethod
    def decode(*parts: Tensor) -> Tensor:
        codes, scale = parts
        z = codes.to(torch.float32) * (1.0 / 127.0)
        return z * z.abs() * scale


class Root8(Codec):
    """Second moment in uint8: code = 255 (v / max v)^(1/4), rounded down or up by a dither, never below 1.

    Linear codes for v diverge and square roots lose the small elements of heavy-tailed blocks. A code of zero
    would decode to v = 0 beside a non-zero momentum, an update hundreds of times too large, hence the floor
    at 1. The scale kept is the fourth root of max v, which no float's range can make underflow.

    Rounding to the nearest code would never let a small element decay: 5 % less v is 1.3 % less of its root,
    below half a code for every code under 40. It stays too large, and its weight learns too slowly. Rounding is
    unbiased for the root and not for v: between small codes, 16 times apart in v, that would mean v far too small
    most of the time, and updates far too large.
    """

    name = "root8"
    parts = (Part("", torch.uint8, BLOCK), Part("scale", torch.float32, 1))

    @staticmethod
    def encode(x: Tensor) -> tuple[Tensor, ...]:
        root = torch.sqrt(torch.sqrt(x))
        scale, inverse = _block_scale(root)
        codes = _defined(torch.floor(255.0 * (root * inverse) + _dither(scale)), largest=255.0)
        return codes.clamp(min=1.0).to(torch.uint8), scale

    @staticmethod
    def decode(*parts: Tensor) -> Tensor:
        codes, scale = parts
        square = (codes.to(torch.float32) * (1.0 / 255.0) * scale) ** 2
        return square * square


def _dither(scale: Tensor) -> Tensor:
    """Thresholds in (0, 1), [blocks, BLOCK]: evenly spread over a block, shifted by its scale's last bits.

    The scale changes at nearly every step, and with it all thresholds. Depending on nothing but the block, they
    are the same at every world size and after every restart. They keep away from 0 and 1, so that a value that
    is a code already stays that code.
    """
    shift = (scale.view(torch.int32) & 0xFFFF).to(torch.float32) * 2.0**-16
    spread = shift + torch.arange(BLOCK, device=scale.device) * _GOLDEN
    return (spread - torch.floor(spread)) * (1.0 - 2.0**-9) + 2.0**-10


FORMATS: dict[str, tuple[type[Codec], type[Codec]]] = {
    # user-facing name: (codec of a signed state, codec of a non-negative state)
    "fp32": (Fp32, Fp32),
    "8bit": (Signed8, Root8),
}


def codec_for(state_format: str, *, signed: bool) -> type[Codec]:
    """The codec that `state_format` ("fp32" or "8bit") means for a signed or a non-negative state."""
    return FORMATS[state_format][0 if signed else 1]
