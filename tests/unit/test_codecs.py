"""Codecs: round trips and every corner that real state gets into."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.state.codecs import BLOCK, FORMATS, Codec, Root8, Signed8, codec_for

TINY = torch.finfo(torch.float32).tiny


@st.composite
def blocks(draw: st.DrawFn, *, signed: bool) -> Tensor:
    """One to four blocks whose magnitude, spread, zeros and outliers vary."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(1, 4)), BLOCK, generator=generator)
    x = x.sign() * x.abs() ** draw(st.sampled_from([1.0, 3.0, 8.0]))
    x = x * 10.0 ** draw(st.integers(-30, 10))
    if draw(st.booleans()):
        x[:, torch.randperm(BLOCK, generator=generator)[: draw(st.integers(1, BLOCK))]] = 0.0
    return x if signed else x.abs()


def round_trip(codec: type[Codec], x: Tensor) -> Tensor:
    return codec.decode(*codec.encode(x))


@given(blocks(signed=True))
def test_signed8_error_is_bounded(x: Tensor) -> None:
    scale = x.abs().amax(dim=1, keepdim=True)
    y, back = (x.abs() / scale.clamp(min=TINY)).sqrt(), (round_trip(Signed8, x).abs() / scale.clamp(min=TINY)).sqrt()
    assert ((back - y).abs() <= 1.001 / 127).all(), "a code at most, on the scale of roots"
    assert (round_trip(Signed8, x) * x >= 0).all(), "no sign changes"


@given(blocks(signed=False))
def test_root8_error_is_bounded(x: Tensor) -> None:
    root, back = x**0.25, round_trip(Root8, x) ** 0.25
    step = root.amax(dim=1, keepdim=True) / 255
    assert ((back - root).abs() <= step * 1.001).all(), "a code at most, on the scale of fourth roots"


def test_small_second_moments_decay() -> None:
    """Rounded to the nearest code, all below a 1,600th of the largest would stay where they are for ever."""
    torch.manual_seed(0)
    v = 10.0 ** (-6 * torch.rand(64, BLOCK))
    v[:, 0] = 1.0
    coded, exact = v, v
    for _ in range(60):
        g = torch.zeros_like(v)
        g[:, 0] = 1.0 + 0.1 * torch.randn(64)  # one element stays busy and keeps the scale where it is
        coded = round_trip(Root8, coded + 0.05 * (g * g - coded))
        exact = exact + 0.05 * (g * g - exact)
    small = (v > 1e-5) & (v < 1e-3)
    assert exact[small].mean() < 0.05 * v[small].mean()
    assert 0.8 < (coded[small].mean() / exact[small].mean()).item() < 1.5, "never smaller: updates would grow"


def test_small_momenta_decay_to_zero() -> None:
    """Beside a busy element, so that the scale stays: rounded to the nearest code they would stay too."""
    torch.manual_seed(0)
    m = torch.randn(64, BLOCK) * 1e-3
    coded, exact = m, m
    for _ in range(60):
        g = torch.zeros_like(m)
        g[:, 0] = 1.0 + 0.1 * torch.randn(64)
        coded = round_trip(Signed8, coded + 0.1 * (g - coded))
        exact = exact + 0.1 * (g - exact)
    rest = slice(1, None)
    assert coded[:, rest].abs().mean() < 3 * exact[:, rest].abs().mean()
    assert (coded[:, rest] == 0).float().mean() > 0.5


def test_rounding_of_second_moments_has_no_bias() -> None:
    torch.manual_seed(0)
    v = (0.1 + 0.9 * torch.rand(4096, BLOCK)) ** 2
    error = round_trip(Root8, v) / v - 1
    assert abs(error.mean().item()) < 2e-4
    assert error.mean(dim=0).abs().max() < 5e-3, "no lane of a block is favoured"


@given(st.booleans().flatmap(lambda s: st.tuples(st.just(s), blocks(signed=s))))
def test_decode_then_encode_gives_the_same_codes(case: tuple[bool, Tensor]) -> None:
    signed, x = case
    codec = codec_for("8bit", signed=signed)
    once = codec.encode(x)
    again = codec.encode(codec.decode(*once))
    assert torch.equal(once[0], again[0])
    assert torch.allclose(once[1], again[1], rtol=1e-6, atol=0.0)


@given(blocks(signed=True))
def test_signed8_is_odd_and_keeps_zero(x: Tensor) -> None:
    assert torch.equal(round_trip(Signed8, -x), -round_trip(Signed8, x))
    assert (round_trip(Signed8, x)[x == 0] == 0).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("state_format", FORMATS)
def test_zeros_stay_zero(state_format: str, signed: bool) -> None:
    codec = codec_for(state_format, signed=signed)
    zeros = torch.zeros(2, BLOCK)
    assert torch.equal(round_trip(codec, zeros), zeros)
    fresh = [torch.zeros(2, part.per_block, dtype=part.dtype) for part in codec.parts]
    assert torch.equal(codec.decode(*fresh), zeros), "fresh state must decode to zeros"


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("signed", [True, False])
def test_what_is_not_finite_never_turns_finite(bad: float, signed: bool) -> None:
    x = torch.rand(3, BLOCK) + 0.5
    x[1, 17] = bad
    back = round_trip(codec_for("8bit", signed=signed), x)
    assert not back[1].isfinite().any(), "the whole block shows it"
    assert back[[0, 2]].isfinite().all(), "no other block does"


@pytest.mark.parametrize("value", [1e-45, 1e-40, TINY / 2])
def test_denormal_blocks_count_as_zero(value: float) -> None:
    x = torch.full((1, BLOCK), value)
    assert torch.equal(round_trip(Signed8, x), torch.zeros_like(x))
    # sqrt lifts a denormal second moment back into the normal range.
    assert torch.allclose(round_trip(Root8, x), x, rtol=1e-2, atol=1e-44)


@given(blocks(signed=False))
def test_no_zero_second_moment_beside_a_momentum(v: Tensor) -> None:
    v[:, 0] = v.amax(dim=1)
    back = round_trip(Root8, v)
    largest = v.amax(dim=1, keepdim=True)
    alive = (largest > 1e-30).expand_as(v)
    assert (back[alive] > 0).all()
    # An element below the last code reads too large, never too small: the update shrinks.
    low = alive & (v**0.25 < largest**0.25 / 255 / 2)
    assert (back[low] >= v[low]).all()


@settings(max_examples=20)
@given(st.integers(-45, 38), st.booleans())
def test_single_values_of_every_exponent(exponent: int, signed: bool) -> None:
    x = torch.zeros(1, BLOCK)
    x[0, 3] = 10.0**exponent if exponent < 38 else 3e38
    back = round_trip(codec_for("8bit", signed=signed), x)
    assert back.isfinite().all()
    if exponent > -37:
        assert back[0, 3].item() == pytest.approx(x[0, 3].item(), rel=1e-5)


def test_bytes_per_element() -> None:
    assert Signed8.bytes_per_element() == 1 + 4 / BLOCK
    assert Root8.bytes_per_element() == 1 + 4 / BLOCK
    assert codec_for("fp32", signed=True).bytes_per_element() == 4
