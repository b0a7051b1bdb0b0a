"""Codecs: round trips and every corner that real state gets into."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.state.codecs import (
    BLOCK,
    FORMATS,
    Codec,
    Fp32,
    Root,
    Scale,
    Signed,
    decode_blocks,
    decode_halves,
    encode_blocks,
    encode_halves,
    pack,
    unpack,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = torch.finfo(torch.float32).tiny

RESIDUAL, QUARTER = Signed(4, relative=True), Signed(2, relative=True)

LARGEST: dict[Codec, int] = {Signed(8): 127, Signed(4): 7, RESIDUAL: 7, QUARTER: 1, Root(8): 255, Root(4): 15}
"""The largest code of each codec that has codes."""

ZERO = {4: 8, 2: 2}
"""By bits, what is added to codes of either sign."""

signed = pytest.mark.parametrize("codec", [Signed(8), Signed(4), RESIDUAL, QUARTER])
second = pytest.mark.parametrize("codec", [Root(8), Root(4)])
coded = pytest.mark.parametrize("codec", LARGEST)
every = pytest.mark.parametrize("codec", [Fp32(), *LARGEST])


@st.composite
def blocks(draw: st.DrawFn) -> Tensor:
    """One to four blocks whose magnitude, spread, zeros and outliers vary."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(1, 4)), BLOCK, generator=generator)
    x = x.sign() * x.abs() ** draw(st.sampled_from([1.0, 3.0, 8.0]))
    x = x * 10.0 ** draw(st.integers(-30, 10))
    if draw(st.booleans()):
        x[:, torch.randperm(BLOCK, generator=generator)[: draw(st.integers(1, BLOCK))]] = 0.0
    return x


def values(codec: Codec, x: Tensor) -> Tensor:
    """`x`, or its magnitude for a codec that takes no negative values."""
    return x.abs() if codec in (Root(8), Root(4)) else x


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    return decode_blocks(codec, *encode_blocks(codec, x))


@signed
@given(x=blocks())
def test_error_of_signed_codes_is_bounded(codec: Codec, x: Tensor) -> None:
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=TINY)
    back = round_trip(codec, x)
    apart = (back.abs() / scale).sqrt() - (x.abs() / scale).sqrt()
    assert (apart.abs() <= 1.001 / LARGEST[codec]).all(), "a code at most, on the scale of roots"
    assert (back * x >= 0).all(), "no sign changes"


@second
@given(x=blocks())
def test_error_of_second_moments_is_bounded(codec: Codec, x: Tensor) -> None:
    root = x.abs() ** 0.25
    step = root.amax(dim=1, keepdim=True) / LARGEST[codec]
    apart = round_trip(codec, x.abs()) ** 0.25 - root
    assert (apart.abs() <= step * 1.001).all(), "a code at most, on the scale of fourth roots"


def busy_beside(m: Tensor, power: int) -> Tensor:
    """A gradient that is zero but for the first lane, where it keeps the scale of `m` where it is."""
    g = torch.zeros_like(m)
    g[:, 0] = (1.0 + 0.1 * torch.randn(len(m))) ** power
    return g


# Codes of 4 bits are far apart, and the mean of fourth powers lies above the fourth power of the mean.
@pytest.mark.parametrize(("codec", "low", "high", "most"), [(Root(8), 1e-5, 1e-3, 1.5), (Root(4), 1e-2, 1e-1, 2.5)])
def test_small_second_moments_decay(codec: Codec, low: float, high: float, most: float) -> None:
    """Rounded to the nearest code, all below a 1,600th of the largest would stay where they are for ever."""
    torch.manual_seed(0)
    v = 10.0 ** (-6 * torch.rand(64, BLOCK))
    v[:, 0] = 1.0
    rounded, exact = v, v
    for _ in range(60):
        g = busy_beside(v, 2)
        rounded = round_trip(codec, rounded + 0.05 * (g - rounded))
        exact = exact + 0.05 * (g - exact)
    small = (v > low) & (v < high)
    assert exact[small].mean() < 0.05 * v[small].mean()
    assert 0.8 < (rounded[small].mean() / exact[small].mean()).item() < most, "never smaller: updates would grow"


@pytest.mark.parametrize(("codec", "size"), [(Signed(8), 1e-3), (Signed(4), 1e-2), (RESIDUAL, 1e-2)])
def test_small_momenta_decay_to_zero(codec: Codec, size: float) -> None:
    """Beside a busy element, so that the scale stays: rounded to the nearest code they would stay too."""
    torch.manual_seed(0)
    m = torch.randn(64, BLOCK) * size
    rounded, exact = m, m
    for _ in range(60):
        g = busy_beside(m, 1)
        rounded = round_trip(codec, rounded + 0.1 * (g - rounded))
        exact = exact + 0.1 * (g - exact)
    rest = slice(1, None)
    assert rounded[:, rest].abs().mean() < 3 * exact[:, rest].abs().mean()
    assert (rounded[:, rest] == 0).float().mean() > 0.5


@pytest.mark.parametrize(("codec", "all_lanes", "each_lane"), [(Root(8), 2e-4, 5e-3), (Root(4), 2e-4, 3e-2)])
def test_rounding_of_second_moments_has_no_bias(codec: Codec, all_lanes: float, each_lane: float) -> None:
    """In the fourth root, above the least code."""
    torch.manual_seed(0)
    v = (0.1 + 0.9 * torch.rand(4096, BLOCK)) ** 4
    error = round_trip(codec, v) ** 0.25 / v**0.25 - 1
    assert abs(error.mean().item()) < all_lanes
    assert error.mean(dim=0).abs().max() < each_lane, "no lane of a block is favoured"


@pytest.mark.parametrize(("codec", "all_lanes", "each_lane"), [(Signed(8), 2e-5, 1e-3), (Signed(4), 2e-4, 1e-2)])
@pytest.mark.parametrize("size", [1.0, 0.05, 1e-3])
def test_rounding_of_momenta_has_no_bias(codec: Codec, all_lanes: float, each_lane: float, size: float) -> None:
    """In the value itself, in every part of its range: momenta add up in the weights."""
    torch.manual_seed(0)
    x = size * torch.rand(4096, BLOCK)
    x[:, 0] = 1.0 + torch.rand(4096)
    error = (round_trip(codec, x) - x)[:, 1:]
    assert abs(error.mean().item()) < all_lanes
    assert error.mean(dim=0).abs().max() < each_lane, "no lane of a block is favoured"


@every
@given(x=blocks())
def test_decode_then_encode_gives_the_same_codes(codec: Codec, x: Tensor) -> None:
    once = encode_blocks(codec, values(codec, x))
    again = encode_blocks(codec, decode_blocks(codec, *once))
    assert torch.equal(once[0], again[0])
    if codec.scaled:
        assert torch.allclose(once[1], again[1], rtol=1e-6, atol=0.0)


@signed
@given(x=blocks())
def test_signed_codes_are_odd_and_keep_zero(codec: Codec, x: Tensor) -> None:
    assert torch.equal(round_trip(codec, -x), -round_trip(codec, x))
    assert (round_trip(codec, x)[x == 0] == 0).all()


@every
def test_zeros_stay_zero(codec: Codec) -> None:
    zeros = torch.zeros(2, BLOCK)
    assert torch.equal(round_trip(codec, zeros), zeros)
    fresh = [torch.zeros(2, spec.per_block, dtype=spec.dtype) for spec in codec.specs()]
    assert torch.equal(decode_blocks(codec, *fresh), zeros), "fresh state must decode to zeros"


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@coded
def test_what_is_not_finite_never_turns_finite(codec: Codec, bad: float) -> None:
    x = torch.rand(3, BLOCK) + 0.5
    x[1, 17] = bad
    back = round_trip(codec, x)
    assert not back[1].isfinite().any(), "the whole block shows it"
    assert back[[0, 2]].isfinite().all(), "no other block does"


@pytest.mark.parametrize("value", [1e-45, 1e-40, TINY / 2])
@coded
def test_denormal_blocks_count_as_zero(codec: Codec, value: float) -> None:
    x = torch.full((1, BLOCK), value)
    back = round_trip(codec, x)
    if codec in (Root(8), Root(4)):  # sqrt lifts a denormal second moment back into the normal range
        assert torch.allclose(back, x, rtol=1e-2, atol=1e-44)
    else:
        assert torch.equal(back, torch.zeros_like(x))


def finite_floats() -> st.SearchStrategy[Tensor]:
    """A block of any finite fp32 numbers, of all magnitudes; zeros, subnormals and the largest are among them."""
    largest = torch.finfo(torch.float32).max
    number = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
        [largest, -largest, TINY, 0.0]
    )
    return st.lists(number, min_size=1, max_size=16).map(lambda some: torch.tensor(some).repeat(BLOCK)[:BLOCK][None])


@every
@given(x=finite_floats())
def test_what_is_finite_stays_finite(codec: Codec, x: Tensor) -> None:
    x = values(codec, x)
    back = round_trip(codec, x)
    assert back.isfinite().all()
    assert (back.abs() <= x.abs().max() * (1 + 1e-6)).all()
    assert round_trip(codec, back).isfinite().all()


@every
def test_the_largest_numbers_stay_finite(codec: Codec) -> None:
    pattern = torch.tensor(torch.finfo(torch.float32).max).view(torch.int32)
    x = (pattern - torch.arange(4 * BLOCK, dtype=torch.int32)).view(torch.float32).view(-1, BLOCK)
    for block in (x, x.flip(1), x[:, :1].expand(-1, BLOCK)):
        torch.testing.assert_close(
            round_trip(codec, block), block, rtol=0.5 if codec in (Signed(4), RESIDUAL) else 0.1, atol=0
        )


@second
@given(x=blocks())
def test_no_zero_second_moment_beside_a_momentum(codec: Codec, x: Tensor) -> None:
    v = x.abs()
    v[:, 0] = v.amax(dim=1)
    back = round_trip(codec, v)
    largest = v.amax(dim=1, keepdim=True)
    alive = (largest > 1e-30).expand_as(v)
    assert (back[alive] > 0).all()
    # An element below the last code reads too large, never too small: the update shrinks.
    low = alive & (v**0.25 < largest**0.25 / LARGEST[codec] / 2)
    assert (back[low] >= v[low]).all()


@coded
@settings(max_examples=20)
@given(exponent=st.integers(-45, 38))
def test_single_values_of_every_exponent(codec: Codec, exponent: int) -> None:
    x = torch.zeros(1, BLOCK)
    x[0, 3] = 10.0**exponent if exponent < 38 else 3e38
    back = round_trip(codec, x)
    assert back.isfinite().all()
    if exponent > -37:
        assert back[0, 3].item() == pytest.approx(x[0, 3].item(), rel=1e-5)


def all_codes(codec: Codec) -> Tensor:
    """[1, codes]"""
    largest = LARGEST[codec]
    codes = torch.arange(1, largest + 1) if codec in (Root(8), Root(4)) else torch.arange(-largest, largest + 1)
    return (codes + (0 if codec in (Root(8), Root(4)) else ZERO.get(codec.bits, 0))).to(codec.dtype).unsqueeze(0)


@coded
def test_what_is_a_code_stays_it_at_every_threshold(codec: Codec) -> None:
    codes = all_codes(codec)
    for size in (1e-8, 0.7, 3e8):  # of second moments, the fourth root of the largest
        scale = torch.full((1, 1), size)
        x = codec.decode(codes, scale)
        for threshold in (2.0**-10, 0.5, 1 - 2.0**-10):
            again = codec.encode(x, Scale(scale, 1 / scale), torch.full(x.shape, threshold))
            assert torch.equal(again, codes)


@coded
@pytest.mark.parametrize("size", [0.25, 1.0, 2.0])
def test_what_is_a_code_stays_it_under_a_scale_of_few_bits(codec: Codec, size: float) -> None:
    """Of such a scale the last bits are zero, and so is the first lane's place among the thresholds."""
    first = codec.decode(all_codes(codec), torch.full((1, 1), size)).T
    x = torch.zeros(len(first), BLOCK)
    x[:, :1], x[:, 5] = first, first[-1]
    scale = encode_blocks(codec, x)[1]
    assert (scale == size).all()
    torch.testing.assert_close(round_trip(codec, x)[:, :1], first, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("codec", [Fp32(), Signed(8), Root(8)])
@given(x=blocks())
def test_halves_of_blocks_are_coded_like_whole_ones(codec: Codec, x: Tensor) -> None:
    """The step works on halves where anything takes 4 bits, on whole blocks elsewhere."""
    x = values(codec, x)
    for parts in (2, 4):
        cut = encode_halves(codec, x.split(BLOCK // parts, dim=1))
        for some, whole in zip(cut, encode_halves(codec, [x]), strict=True):
            assert torch.equal(torch.cat(some, dim=1), whole[0])


@pytest.mark.parametrize("codec", [Signed(4), RESIDUAL, Root(4)])
@given(x=blocks())
def test_quarters_of_blocks_are_packed_like_halves(codec: Codec, x: Tensor) -> None:
    """Where a state takes 2 bits, those of 4 are worked on in quarters, too."""
    x = values(codec, x)
    stored, scale = encode_halves(codec, x.split(BLOCK // 4, dim=1))
    assert torch.equal(torch.cat(stored, dim=1), encode_blocks(codec, x)[0])
    assert torch.equal(torch.cat(decode_halves(codec, stored, scale), dim=1), round_trip(codec, x))


def reference_codes(codec: Codec, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes of `x` [blocks, BLOCK] under the fp32 `scale` [blocks, 1], in float64 from what the docstrings say."""
    shift = (scale.view(np.int32) & 0xFFFF) / 2**16
    dither = (shift + np.arange(BLOCK) * (5**0.5 - 1) / 2) % 1 * (1 - 2.0**-9) + 2.0**-10
    largest = LARGEST[codec]
    if codec in (Root(8), Root(4)):
        return np.maximum(np.floor(largest * x.astype(np.float64) ** 0.25 / scale + dither), 1)
    square = largest**2 * np.abs(x).astype(np.float64) / scale
    low = np.floor(np.sqrt(square))
    code = np.where(square > low**2 + dither * (2 * low + 1), low + 1, low)
    return np.sign(x) * code + ZERO.get(codec.bits, 0)


@coded
def test_codes_are_those_of_a_reference(codec: Codec) -> None:
    torch.manual_seed(0)
    x = values(codec, torch.randn(64, BLOCK) ** 3)
    stored, scale = encode_blocks(codec, x)
    codes = torch.cat(unpack([stored], codec.bits), dim=1) if codec.bits < 8 else stored
    want = reference_codes(codec, x.numpy(), scale.numpy())
    apart = codes.double().numpy() - want
    assert np.abs(apart).max() <= 1
    assert np.mean(apart != 0) < 1e-3, "what lies on a threshold may fall to either side"


@pytest.mark.parametrize("bits", [4, 2])
def test_a_byte_holds_any_codes(bits: int) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(*pack(unpack([every_byte], bits), bits), every_byte)
    every_code = torch.cartesian_prod(*[torch.arange(2**bits, dtype=torch.uint8)] * (8 // bits))
    parts = [part.reshape(2, 128) for part in every_code.T]
    for got, want in zip(unpack(pack(parts, bits), bits), parts, strict=True):
        assert torch.equal(got, want)


def test_lane_i_shares_a_byte_with_lane_i_plus_half_a_block() -> None:
    x = torch.zeros(1, BLOCK)
    x[0, 5], x[0, 5 + BLOCK // 2] = 1.0, -1.0  # codes 8 + 7 and 8 - 7; zero is 8
    stored, _ = encode_blocks(Signed(4), x)
    assert stored[0, 5].item() == 15 + 16 * 1
    assert set(stored[0, torch.arange(BLOCK // 2) != 5].tolist()) == {8 + 16 * 8}


def test_a_lane_of_2_bits_shares_a_byte_with_those_a_quarter_block_away() -> None:
    x = torch.zeros(1, BLOCK)
    x[0, 5], x[0, 5 + 3 * BLOCK // 4] = 1.0, -1.0  # codes 2 + 1 and 2 - 1; zero is 2
    stored, _ = encode_blocks(QUARTER, x)
    assert stored.shape == (1, BLOCK // 4)
    assert stored[0, 5].item() == 3 + 4 * 2 + 16 * 2 + 64 * 1
    assert set(stored[0, torch.arange(BLOCK // 4) != 5].tolist()) == {2 * (1 + 4 + 16 + 64)}


def test_a_residual_is_coded_like_a_momentum() -> None:
    """What it is the residual of is up to the step: `tests/unit/test_step.py`."""
    x = torch.randn(8, BLOCK)
    for got, want in zip(encode_blocks(RESIDUAL, x), encode_blocks(Signed(4), x), strict=True):
        assert torch.equal(got, want)
    assert [codec for codec in (Fp32(), *LARGEST) if codec.relative] == [RESIDUAL, QUARTER]
    assert (FORMATS["4bit"].residual, FORMATS["2bit"].residual) == (RESIDUAL, QUARTER)


@every
def test_bytes_per_element(codec: Codec) -> None:
    parts = encode_blocks(codec, torch.rand(4, BLOCK))
    want = codec.bits / 8 + (0 if codec == Fp32() else 4 / BLOCK)
    assert codec.bytes_per_element() == want
    assert sum(part.nbytes for part in parts) == want * 4 * BLOCK, "what is stored is what is counted"
    for spec, stored in zip(codec.specs(), parts, strict=True):
        assert (stored.dtype, stored.shape) == (spec.dtype, (4, spec.per_block))
