"""Weights without a second copy: the bf16 weight that the model computes with, and the bits that rounding dropped.

An fp32 number is 32 bits, of which its bf16 neighbour is the upper 16. `Remainder` keeps the difference of the two
bit patterns, as a whole number, in 16, 8, 4 or no bits: with 16 the pair *is* the fp32 number, with 8 it has 24 of its
bits, with 4 it has 20, and with none it is the bf16 weight alone. Integer shifts do it, there is no exponent
arithmetic. Where bits are dropped, they are rounded stochastically: an update smaller than the last bit is taken with
the probability that makes it right on average, instead of never.

The bf16 weight is the pattern rounded half up in magnitude. That differs from the IEEE rule in exact ties only
(lower bits 0x8000), one pattern in 65,536: a tie to even can lie 32768 above its bf16 neighbour or 32768 below, one
value more than 16 bits have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.state.codecs import BLOCK, TensorSpec, spread, unpack

_ROW = 40503
"""Odd, 2^16 over the golden ratio: multiples of it, modulo 2^16, spread the rounding of consecutive blocks."""


@dataclass(frozen=True)
class Remainder:
    """The lower bits of fp32 weights as state: signed whole numbers in `bits` bits, zero at the start.

    With 16 bits the weights are exactly fp32; 8 keep sign, exponent and 15 bits of mantissa, 4 keep 11 of them. With 0
    there is no remainder, and bf16's 7 bits are all of the mantissa.

    Zero means the bf16 weight itself. 4-bit remainders are held as 0 to 15 in uint8, two to a byte in memory; of 16
    bits the upper and the lower byte are tensors of their own (vectorised CPU code has no 16-bit integers).
    """

    bits: int

    @property
    def name(self) -> str:
        """As the option `weights` has it."""
        return f"bf16+{self.bits}" if self.bits else "bf16"

    def specs(self) -> tuple[TensorSpec, ...]:
        """The stored tensors."""
        if self.bits == 0:
            return ()
        if self.bits == 4:
            return (TensorSpec("", torch.uint8, BLOCK // 2),)
        upper = TensorSpec("", torch.int8, BLOCK)
        return (upper, TensorSpec("low", torch.uint8, BLOCK)) if self.bits == 16 else (upper,)

    def bytes_per_element(self) -> float:
        """Stored bytes per element."""
        return self.bits / 8

    def unpacked(self, *stored: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `specs()` with a value for every lane, [blocks, BLOCK]."""
        return (torch.cat(unpack(stored), dim=1),) if self.bits == 4 else stored

    def join(self, weight: Tensor, *stored: Tensor) -> Tensor:
        """The fp32 weight of a bf16 weight and its remainder (4-bit codes unpacked), tensors of one shape."""
        if self.bits == 0:
            return weight.to(torch.float32)
        low = stored[0].to(torch.int32)
        if self.bits == 4:
            low = (low ^ 8) - 8  # two's complement of 4 bits
        elif self.bits == 16:
            low = (low << 8) + stored[1].to(torch.int32)
        bits = weight.to(torch.float32).view(torch.int32)
        # A weight that was set to zero by hand, beside an old remainder: below zero's pattern are those of NaN.
        low = torch.where((bits << 1) == 0, low.clamp(min=0), low)
        return (bits + (low << (16 - self.bits))).view(torch.float32)

    def split(self, theta: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, ...]:
        """fp32 to (bf16 weight, *remainder), the inverse of `join` as far as the bits go.

        `threshold`: in [0, 1), of the shape of `theta`; a value that lies a fraction f above the one below it that
        can be stored goes up where threshold >= 1 - f. None: to the nearest.
        """
        # A NaN of any payload, since adding to the pattern of some would turn them into numbers.
        bits = torch.where(theta == theta, theta, torch.nan).view(torch.int32)
        dropped = 16 - self.bits
        if dropped:
            half = 1 << (dropped - 1)
            bits = bits + (half if threshold is None else (threshold * float(1 << dropped)).to(torch.int32))
        kept = bits >> dropped
        if self.bits == 0:
            return ((kept << 16).view(torch.float32).to(torch.bfloat16),)
        kept = kept + (1 << (self.bits - 1))
        weight = ((kept >> self.bits) << 16).view(torch.float32).to(torch.bfloat16)
        if self.bits == 4:
            return weight, ((kept & 15) ^ 8).to(torch.uint8)
        if self.bits == 16:
            return weight, (((kept >> 8) & 255) - 128).to(torch.int8), (bits & 255).to(torch.uint8)
        return weight, ((kept & 255) - 128).to(torch.int8)


MASTER = "fp32"
"""The `weights` of tensors that are fp32 themselves, or of which DeepSpeed hands over its fp32 copy."""

WEIGHTS: dict[str, Remainder] = {kind.name: kind for kind in map(Remainder, (8, 16, 4, 0))}
"""Every other value of `weights`."""

DEFAULT_WEIGHTS = Remainder(8).name


def rounding_phase(seed: int, step: int, block: int) -> int:
    """Where the thresholds of block number `block` start at optimizer step `step`: 0 to 65535.

    `block` counts from the start of the parameter group, over all ranks: thresholds depend on seed, step and the
    element's place in the whole model and not on how it is sharded.
    """
    return (seed * 25717 + step * 40503 * 7 + block * _ROW) & 0xFFFF


def thresholds(phase: Tensor, blocks: int, first: int, lanes: int) -> Tensor:
    """Thresholds in [0, 1), [blocks, lanes], for consecutive blocks from the one with `phase` (fp32, 0-d) on.

    Over steps, over blocks and over the lanes of a block they are evenly spread, more evenly than random numbers.
    """
    row = torch.arange(blocks, device=phase.device).unsqueeze(1)
    shift = ((row * _ROW + phase.to(torch.int64)) & 0xFFFF).to(torch.float32) * 2.0**-16
    return spread(shift, first, lanes)
