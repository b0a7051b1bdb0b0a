"""A rule whose functions are not elementwise and pure is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from toolkit.errors import UserError
from toolkit.optim import RULES, NonNegative, Rule, State, as_optimizer
from toolkit.optim.purity import check_pure, with_defaults


def rule(update: Any, **fields: Any) -> type[Rule]:
    """A rule with one state and this update."""
    body = {"states": (State("m"),), "update": staticmethod(update), "lr": 0.1, "__module__": __name__}
    body |= {
        "scalars": lambda self, t: {"lr": self.lr, "off": 0.0, "tiny": 1e-5},
        "__annotations__": {"lr": NonNegative} | fields,
    }
    return type("OddRule", (Rule,), body)


def keep(theta: Any, g: Any, m: Any, **s: Any) -> Any:
    return theta - s["lr"] * g, m + g


def in_place(theta: Any, g: Any, m: Any, **s: Any) -> Any:
    return theta - s["lr"] * g, m.add_(g)


@pytest.mark.parametrize(
    ("update", "says"),
    [
        (lambda theta, g, m, **s: (theta - s["lr"] * g / g.square().mean().sqrt(), m), "OddRule.update is not element"),
        (lambda theta, g, m, **s: (theta - s["lr"] * (g - g.mean(1, keepdim=True)), m), "not elementwise"),
        (lambda theta, g, m, **s: (theta, m + g / g.norm()), "not elementwise"),
        (lambda theta, g, m, **s: (theta - s["tiny"] * g / g.norm(), m), "not elementwise"),
        (lambda theta, g, m, **s: (theta - s["lr"] * (g - s["off"] * g.mean()), m), "not elementwise"),
        (lambda theta, g, m, **s: (theta, g.roll(1, dims=1)), "not elementwise"),
        (lambda theta, g, m, **s: (theta + torch.rand_like(theta), m), "random numbers"),
        (lambda theta, g, m, **s: (theta, m.sum()), "another shape"),
        (lambda theta, g, m, **s: theta - g, "returns 1 tensors, but must return 2"),
        (in_place, "changes a tensor"),
    ],
)
def test_what_is_not_elementwise_is_refused_by_name(update: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        as_optimizer(rule(update))
    assert "Odd" not in RULES


def test_results_that_are_not_finite_are_as_elementwise_as_others() -> None:
    try:
        as_optimizer(rule(lambda theta, g, m, **s: (theta - s["lr"] * g.log(), m / 0.0 + g.exp().exp().sin())))
    finally:
        RULES.pop("Odd", None)


def test_a_rule_without_defaults_is_checked_when_it_is_made() -> None:
    def mean(theta: Any, g: Any, m: Any, **s: Any) -> Any:
        return theta - s["lr"] * g.mean(), m

    odd = rule(mean, decay=float)
    assert with_defaults(odd) is None
    try:
        optimizer = as_optimizer(odd)
        with pytest.raises(UserError, match="OddRule.update is not elementwise"):
            optimizer([torch.nn.Parameter(torch.zeros(4, 4))], decay=0.0)
    finally:
        RULES.pop("Odd", None)


def test_checking_changes_neither_the_random_numbers_nor_a_sound_rule() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        sound = with_defaults(rule(keep))
        assert sound is not None
        check_pure(sound)
    assert torch.equal(torch.random.get_rng_state(), before)
