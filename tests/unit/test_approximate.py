"""What a GPU's approximate square roots and quotients change: fewer than one code in 1,000.

Nothing but a GPU computes them its way (Triton's interpreter has exact ones), so results of the eager step's own
operations are moved at random, as far as CUDA's documentation allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.optim import AMCSRule, SOAMRule
from toolkit.optim.kernel import StepFunction
from toolkit.optim.rule import Rule
from toolkit.state.codecs import BLOCK, unpack
from toolkit.state.layout import layout, state_formats

pytestmark = pytest.mark.usefixtures("one_thread")

PLACES = 2
"""Units in the last place that approximate roots and quotients may be off by."""

STEPS, BLOCKS = 5, 128


class Approximate(TorchDispatchMode):
    """While this lasts, fp32 square roots and quotients are off by up to `places` units in the last place."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        exact = func(*args, **(kwargs or {}))
        roots = (torch.ops.aten.sqrt.default, torch.ops.aten.div.Tensor, torch.ops.aten.reciprocal.default)
        if func not in roots or exact.dtype != torch.float32:
            return exact
        off = torch.randint(-self.places, self.places + 1, exact.shape, generator=self.generator, dtype=torch.int32)
        moved = (exact.view(torch.int32) + off).view(torch.float32)
        return torch.where((exact == 0) | ~exact.isfinite(), exact, moved)


def steps(rule: type[Rule], state_format: str, places: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """fp32 weights before and after STEPS eager steps, and the codes."""
    generator = torch.Generator().manual_seed(1)
    made = rule(total_steps=10) if "total_steps" in rule.model_fields else rule()
    kept = layout(rule.states, state_formats(rule.states, state_format, where="here"), "fp32", torch.float32)
    function = StepFunction(rule, tuple(made.scalars(1)), kept)
    start = torch.randn(BLOCKS, BLOCK, generator=generator)
    theta = start.clone()
    parts = list(kept.allocate(BLOCKS * BLOCK, torch.device("cpu")).values())
    for step in range(1, STEPS + 1):
        g = torch.randn(BLOCKS, BLOCK, generator=generator) ** 3 * 1e-2
        scalars = torch.tensor(list(made.scalars(step).values()))
        with Approximate(places):
            function(False, theta, g, scalars, torch.ones(()), parts, (0, step, 0))
    named = zip((key for key, _ in kept.specs), parts, strict=True)
    codes = {key: torch.cat(unpack([x]), dim=1) if x.shape[1] < BLOCK else x for key, x in named if x.shape[1] > 1}
    return start, theta, codes


def apart(rule: type[Rule], state_format: str, places: int) -> tuple[float, float]:
    """The largest share of codes that differ, and the difference of the weights relative to how far they moved."""
    start, exact, codes = steps(rule, state_format, 0)
    _, other, other_codes = steps(rule, state_format, places)
    differ = max(float((codes[key] != other_codes[key]).float().mean()) for key in codes)
    return differ, float((other - exact).norm() / (exact - start).norm())


@pytest.mark.parametrize("state_format", ["8bit", "compact", "minimal"])
@pytest.mark.parametrize("rule", [AMCSRule, SOAMRule])
def test_approximate_roots_keep_the_codes(rule: type[AMCSRule | SOAMRule], state_format: str) -> None:
    codes, weights = apart(rule, state_format, PLACES)
    assert codes < 1e-3
    most = rule.update_error[state_format] / 100
    assert weights < most / 10, "of the error of the codes themselves; a code in 4 bits is a coarse one"


def test_worse_roots_would_be_seen() -> None:
    codes, weights = apart(AMCSRule, "8bit", 2**12)
    assert codes > 1e-3 and weights > 1e-3
