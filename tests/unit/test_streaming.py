"""A tensor's step does not depend on how its gradient was cut into pieces."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import toolkit.optim.kernel as step_module
from toolkit.errors import UserError
from toolkit.optim import AMCS
from toolkit.optim.optimizer import RuleOptimizer
from toolkit.optim.streaming import TensorStep
from toolkit.state.codecs import BLOCK

LARGE = 432_741
"""Elements: several times what is staged, and no whole number of blocks."""

CUTTINGS: dict[str, list[int]] = {
    "odd sizes": [1, 255, 256, 257, 65_535, 65_537, 200_000],
    "large then small": [200_000, 257, 65_537, 1, 65_536, 255],
    "just above what is staged": [65_537],
    "just what is staged": [65_536],
    "many small": [1] * 300 + [9_999],
}
"""Sizes of pieces, over and over."""

# Few, because each is compiled: weights, and the format of the state.
LAYOUTS = [(torch.float32, "8bit"), (torch.bfloat16, "compact"), (torch.bfloat16, "minimal")]
layouts = pytest.mark.parametrize(("dtype", "state_format"), LAYOUTS)


class Model:
    """One matrix of `numel` elements under AMCS, and the same gradients every time it is made."""

    def __init__(self, numel: int, dtype: torch.dtype, state_format: str, compiled: bool) -> None:
        self.generator = torch.Generator().manual_seed(numel)
        self.weight = nn.Parameter(self.draw(numel).to(dtype).view(1, -1))
        self.optimizer: RuleOptimizer = AMCS(
            [self.weight], lr=1e-2, alpha=0.7, state_format=state_format, weights="bf16+4", compile=compiled
        )

    def draw(self, numel: int) -> Tensor:
        x = torch.randn(numel, generator=self.generator)
        return x**3

    def gradient(self) -> Tensor:
        return self.draw(self.weight.numel()).to(self.weight.dtype)

    def begin(self) -> TensorStep:
        begun = self.optimizer.begin(self.optimizer.param_groups[0], self.weight)
        assert begun is not None
        return begun

    def everything(self) -> dict[str, Tensor]:
        held = {key: value for key, value in self.optimizer.state[self.weight].items() if isinstance(value, Tensor)}
        return held | {"weight": self.weight.detach()}


ONE = torch.ones(())


def pieces(gradient: Tensor, sizes: Iterable[int]) -> list[Tensor]:
    cut, start = [], 0
    for size in itertools.cycle(sizes):
        if start >= gradient.numel():
            return cut
        cut.append(gradient[start : start + size])
        start += size
    raise AssertionError


def train(model: Model, sizes: Iterable[int], steps: int = 2, first_block: int = 0) -> dict[str, Tensor]:
    for _ in range(steps):
        stream = model.begin().stream(first_block=first_block)
        given = [piece if i % 2 else piece.clone() for i, piece in enumerate(pieces(model.gradient(), sizes))]
        for piece in given:
            stream.add(piece, ONE)
        stream.finish(ONE)
        for piece in given:
            piece.fill_(torch.nan)  # whoever gave it may use its memory again
    return model.everything()


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key
        assert value.float().isfinite().all(), key


@pytest.mark.parametrize("cutting", CUTTINGS)
@pytest.mark.parametrize("state_format", ["8bit", "compact", "minimal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_what_the_whole_gives(
    dtype: torch.dtype, state_format: str, cutting: str, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(Model(LARGE, dtype, state_format, False), [LARGE])
    monkeypatch.setitem(step_module.EAGER_ROWS, "cpu", 100)  # the slices of the eager step are pieces, too
    assert_same(train(Model(LARGE, dtype, state_format, False), CUTTINGS[cutting]), whole)


@pytest.mark.parametrize(("dtype", "state_format"), [*LAYOUTS[:2], pytest.param(*LAYOUTS[2], marks=pytest.mark.slow)])
def test_compiled_pieces_give_what_the_whole_gives(
    dtype: torch.dtype, state_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(Model(LARGE, dtype, state_format, True), [LARGE])
    monkeypatch.setattr(step_module, "COMPILED_ROWS", 100)  # as what is too large for one call is stepped in several
    for cutting in ("odd sizes", "large then small"):
        model = Model(LARGE, dtype, state_format, True)
        assert_same(train(model, CUTTINGS[cutting]), whole)
        assert model.begin().function.fallback_reason is None


SIZES = [1, 5, 255, 256, 257, 511, 512, 513, 768, 769, 1024, 1025]


def by_blocks(model: Model, first_block: int) -> dict[str, Tensor]:
    """One step by the step function alone, on a padded copy of the whole tensor."""
    begun = model.begin()
    numel, blocks = model.weight.numel(), -(-model.weight.numel() // BLOCK)
    theta = begun.theta.new_zeros(blocks * BLOCK)
    theta[:numel] = begun.theta
    gradient = torch.zeros_like(theta)
    gradient[:numel] = model.gradient()
    view = (blocks, BLOCK)
    place = (begun.seed, begun.step, first_block)
    begun.function(False, theta.view(view), gradient.view(view), begun.scalars, ONE, begun.parts, place)
    begun.theta.copy_(theta[:numel])
    return model.everything()


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("state_format", ["8bit", "compact", "minimal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_tensors_are_padded_and_nothing_more(
    dtype: torch.dtype, state_format: str, numel: int, one_thread: None
) -> None:
    want = by_blocks(Model(numel, dtype, state_format, False), first_block=3)
    for sizes in ([numel], [7, 1, 300]):
        assert_same(train(Model(numel, dtype, state_format, False), sizes, steps=1, first_block=3), want)


@layouts
def test_compiled_small_tensors_are_like_parts_of_large_ones(dtype: torch.dtype, state_format: str) -> None:
    """The compiled step takes two blocks or more: where there are fewer, or an end, it works on a copy."""
    large = Model(4096, dtype, state_format, True)
    start, gradient = large.weight.detach().clone().flatten(), large.gradient()
    stream = large.begin().stream(first_block=3)
    stream.add(gradient, ONE)
    stream.finish(ONE)
    want = large.everything()
    for numel in SIZES:
        small = Model(numel, dtype, state_format, True)
        small.weight.data.copy_(start[:numel])
        stream = small.begin().stream(first_block=3)
        stream.add(gradient[:numel], ONE)
        stream.finish(ONE)
        whole = numel // BLOCK  # blocks of which nothing is missing
        for key, value in small.everything().items():
            cut = slice(whole * BLOCK) if key == "weight" else slice(whole)
            a, b = (x.flatten() if key == "weight" else x for x in (value, want[key]))
            assert torch.equal(a[cut], b[cut]), (numel, key)


@pytest.mark.parametrize("given", [0, 1, 256, 300, 65_536, 65_537, 150_000])
def test_a_gradient_that_is_not_given_is_zero(given: int, one_thread: None) -> None:
    numel, results = 200_001, []
    for padded in (True, False):
        model = Model(numel, torch.bfloat16, "compact", False)
        gradient = model.gradient()
        stream = model.begin().stream(first_block=0)
        stream.add(gradient[:given], ONE)
        if padded:
            stream.add(torch.zeros(numel - given, dtype=torch.bfloat16), ONE)
        stream.finish(ONE)
        results.append(model.everything())
    assert_same(results[1], results[0])
    assert results[0]["remainder"].count_nonzero() > numel / 4, "weights decay without a gradient, too"


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_scale_multiplies_the_gradient(gradient_dtype: torch.dtype, one_thread: None) -> None:
    """In fp32, whatever the gradient is: that is how clipping reaches it."""
    results = []
    for scaled in (True, False):
        model = Model(LARGE, torch.bfloat16, "compact", False)
        gradient = model.draw(LARGE).to(gradient_dtype)
        scale = torch.tensor(0.123)
        stream = model.begin().stream(first_block=0)
        for piece in pieces(gradient, CUTTINGS["odd sizes"]):
            stream.add(piece if scaled else piece.float() * scale, scale if scaled else ONE)
        stream.finish(scale if scaled else ONE)
        results.append(model.everything())
    assert_same(results[0], results[1])


def in_halves(cut: int, first_blocks: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Two ranks' shares of a tensor, the later one first."""
    model = Model(100_001, dtype, "compact", False)
    for _ in range(2):
        begun, gradient = model.begin(), model.gradient()
        for start, stop, first in ((cut, None, first_blocks[1]), (0, cut, first_blocks[0])):
            stream = begun.stream(start, stop, first_block=first)
            stream.add(gradient[start:stop], ONE)
            stream.finish(ONE)
    return model.everything()


@pytest.mark.parametrize("blocks", [1, 130, 390])
def test_shares_of_a_tensor_are_rounded_like_the_whole(blocks: int, one_thread: None) -> None:
    whole = train(Model(100_001, torch.bfloat16, "compact", False), [100_001], first_block=11)
    assert_same(in_halves(blocks * BLOCK, (11, 11 + blocks)), whole)


def test_only_rounding_depends_on_where_a_block_is(one_thread: None) -> None:
    whole = train(Model(100_001, torch.bfloat16, "compact", False), [100_001], first_block=0)
    elsewhere = in_halves(130 * BLOCK, (0, 131))
    assert not torch.equal(elsewhere["remainder"][130:], whole["remainder"][130:])
    exact = train(Model(100_001, torch.float32, "compact", False), [100_001], first_block=0)
    assert_same(in_halves(130 * BLOCK, (0, 131), torch.float32), exact)


def test_a_sparse_gradient_is_refused() -> None:
    model = Model(1024, torch.float32, "8bit", False)
    with pytest.raises(UserError, match="sparse"):
        model.begin().stream(first_block=0).apply(0, torch.zeros(1024).to_sparse(), ONE)
