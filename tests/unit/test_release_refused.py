"""Which rules gradients can be released with: those that look at single elements."""

from __future__ import annotations

from typing import Any

import pytest
from engines import BASE, Net

import toolkit
from toolkit.config import validate
from toolkit.errors import UserError
from toolkit.estimate.predict import Case, alternatives
from toolkit.optim import RULES

ELEMENTWISE = ("AMCS", "SOAM", "AdamW8", "Lion8", "QHAdam", "AdEMAMix", "LOMO")
LOOKS_AT = {
    "StableAdamW": "rms2",
    "Lamb8": "theta2, u2",
    "Adafactor8": "row, column, theta2, ratio2, mean_r",
    "Muon8": "o",
    "NorMuon": "o, o2, u2",
    "AdaMuon": "o, u2",
    "SinkGD": "x",
    "SCALE": "line2",
}


def config(rule: str, **params: Any) -> dict[str, Any]:
    return BASE | {
        "optimizer": {"type": rule, "params": {"lr": 1e-3, "release_gradients": True} | params},
        "zero_optimization": {"stage": 2},
    }


def test_every_rule_of_the_package_is_tried() -> None:
    own = {name for name, optimizer in RULES.items() if optimizer.__module__.startswith("toolkit.optim.rules.")}
    assert own == {*ELEMENTWISE, *LOOKS_AT}


@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_what_looks_at_single_elements_may(rule: str) -> None:
    validate(config(rule), origin="my.json")


@pytest.mark.parametrize(("rule", "names"), LOOKS_AT.items())
def test_what_looks_at_whole_parameters_is_refused_by_name(rule: str, names: str) -> None:
    with pytest.raises(
        UserError, match=f"and {rule} looks at whole parameters \\({names}\\) before it updates"
    ) as told:
        validate(config(rule), origin="my.json")
    assert "\n" not in str(told.value) and str(told.value).startswith("my.json: optimizer.params.release_gradients ")


def test_an_optimizer_that_is_handed_over_is_refused_too(one_rank: None) -> None:
    model = Net()
    plain = {key: value for key, value in config("Muon8").items() if key != "optimizer"}
    made: Any = RULES["Muon8"](model.parameters(), release_gradients=True, compile=False)
    with pytest.raises(UserError, match=r"release_gradients does not fit a rule that looks at whole parameters \(o\)"):
        toolkit.initialize(model=model, config=plain, optimizer=made)


@pytest.mark.parametrize(("rule", "offered"), [("LOMO", True), ("Muon8", False)])
def test_an_estimate_offers_it_where_it_works(rule: str, offered: bool) -> None:
    case = Case("qwen3-tiny", config(rule, release_gradients=False), 1, 1, 64, device="cpu")
    words = {said for said, _ in alternatives(case)}
    assert ("optimizer.params.release_gradients true" in words) == offered
