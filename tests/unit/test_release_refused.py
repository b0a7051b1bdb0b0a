"""What gradients can be released with: rules whose step of a parameter needs no other parameter's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import safe_get_full_grad
from engines import BASE, Net
from torch import Tensor, nn

import toolkit
from toolkit.config import validate
from toolkit.errors import UserError
from toolkit.estimate.predict import Case, alternatives
from toolkit.optim import RULES
from toolkit.zero.release_stages import ReleasingZeroOptimizer3

SEVERAL = {"alpha": "agreement"}
"""Of AMCS: it looks at the momenta of the whole model."""


def config(rule: str, stage: int = 2, **params: Any) -> dict[str, Any]:
    return BASE | {
        "optimizer": {"type": rule, "params": {"lr": 1e-3, "release_gradients": True} | params},
        "zero_optimization": {"stage": stage},
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_rule_of_the_package_may(stage: int) -> None:
    own = [name for name, optimizer in RULES.items() if optimizer.__module__.startswith("toolkit.optim.rules.")]
    assert len(own) > 10
    for rule in own:
        validate(config(rule, stage), origin="my.json")


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as told:
        validate(config, origin="my.json")
    assert "\n" not in str(told.value)
    return str(told.value).removeprefix("my.json: optimizer.params.release_gradients ")


def test_what_needs_all_gradients_is_refused_in_one_sentence() -> None:
    said = refused(config("AMCS", **SEVERAL))
    assert said.startswith("uses each gradient as soon as it is there, and AMCS looks at several parameters (fast_slow")
    assert refused(config("AMCS", stage=0)).startswith("works at zero_optimization.stage 1, 2 and 3, and it is 0")
    said = refused(config("AMCS") | {"gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 1})
    assert "whose sum over several takes all that would be freed" in said


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_that_is_handed_over_is_refused_too(one_rank: None, stage: int) -> None:
    plain = {key: value for key, value in config("AMCS", stage).items() if key != "optimizer"}
    model = Net()
    made: Any = RULES["AMCS"](model.parameters(), release_gradients=True, compile=False, **SEVERAL)
    with pytest.raises(UserError, match=r"a rule that looks at several parameters \(fast_slow, fast2, slow2\)"):
        toolkit.initialize(model=model, config=plain, optimizer=made)


def test_a_gradient_that_is_gone_is_not_shown(one_rank: None) -> None:
    engine, *_ = toolkit.initialize(model=Square(), config=config("AdamW8", 3, compile=False))
    engine.backward(engine(torch.ones(1, 16, dtype=torch.bfloat16)))
    with pytest.raises(UserError, match=r"the gradient of weight is gone: with optimizer.params.release_gradients"):
        safe_get_full_grad(engine.module.weight)
    engine.step()
    assert engine.was_step_applied()


class Square(nn.Linear):
    """One matrix of whole blocks."""

    def __init__(self) -> None:
        super().__init__(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float().square().mean()


@pytest.mark.parametrize(("params", "offered"), [({}, True), (SEVERAL, False)])
@pytest.mark.parametrize("stage", [2, 3])
def test_an_estimate_offers_it_where_it_works(stage: int, params: dict[str, Any], offered: bool) -> None:
    case = Case("qwen3-tiny", config("AMCS", stage, release_gradients=False, **params), 1, 1, 64, device="cpu")
    words = {said for said, _ in alternatives(case)}
    assert ("optimizer.params.release_gradients true" in words) == offered


@pytest.mark.parametrize("include", [None, [OffloadStateTypeEnum.lp_grads]])
def test_gradients_that_are_gone_cannot_be_offloaded(include: Any) -> None:
    zero = object.__new__(ReleasingZeroOptimizer3)
    with pytest.raises(UserError, match="release_gradients frees as soon as each"):
        zero.offload_states(include)
