"""The audit of a training's first steps: what is in no group, gets no gradient or does not move is named."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import deepspeed
import pytest
import torch
from engines import BASE, Net, step
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import toolkit
from toolkit.errors import UserError
from toolkit.memory.trace import allocations
from toolkit.zero.audit import WATCHED, _checksums
from toolkit.zero.gradients import NORM_CHUNK

pytestmark = pytest.mark.usefixtures("one_rank")
SIZE = 24 * 40 + 40 + 40 + 40 + 40 * 8 + 8


class Spare(Net):
    """With a matrix that no loss depends on, and one that others multiply by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.zeroed = nn.Linear(40, 8, bias=False), nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = super().forward(x) + (self.zeroed(x) * 0.0).float().sum()
        return loss


def config(rule: str = "AMCS", stage: int = 2, *, scheduler: Any = None, **params: Any) -> dict[str, Any]:
    own = {"compile": False} if rule == "AMCS" else {"torch_adam": True}
    made = BASE | {
        "optimizer": {"type": rule, "params": {"lr": 1e-3, **own, **params}},
        "zero_optimization": {"stage": stage},
    }
    return made | ({"scheduler": scheduler} if scheduler else {})


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.module == "audit"]


def engine_of(model: nn.Module, made: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return toolkit.initialize(model=model, config=made, total_steps=8, **kwargs)[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("rule", "runs"), [("AMCS", "AMCS"), ("AdamW", "AdamW")])
def test_a_training_in_which_all_moves_is_one_line(stage: int, rule: str, runs: str) -> None:
    engine = engine_of(Net(), config(rule, stage))
    assert engine.leanstate_audit.line is None
    step(engine)
    assert engine.leanstate_audit.line == (
        f"audit: {SIZE:,} parameters in 6 tensors, each in one group, moved by step 1; optimizer {runs}"
    )
    assert not engine.leanstate_audit._watched, "nothing is looked at any more"
    assert not any(param._backward_hooks for param in engine.module.parameters())


@pytest.mark.parametrize("stage", [2, 3])
def test_what_gets_no_gradient_is_named_though_weight_decay_moves_it(
    stage: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = Spare()
    model.norm.weight.requires_grad_(False)
    engine = engine_of(model, config(stage=stage, weight_decay=0.5))
    step(engine)
    line = engine.leanstate_audit.line
    assert "in 7 tensors (1 more are frozen)" in line and "5 moved by step 1" in line
    assert "1 without a gradient so far: spare.weight; 1 whose gradient is zero so far: zeroed.weight" in line
    assert not said(caplog)
    for _ in range(WATCHED - 1):
        step(engine)
    told = said(caplog)
    assert len(told) == 2
    assert told[0].startswith("spare.weight: no gradient came") and told[1].startswith(
        "zeroed.weight: the gradient was"
    )


def test_checksums_keep_nothing_of_their_own_beside_the_pieces_that_they_are_of() -> None:
    engine = engine_of(nn.Sequential(nn.Linear(1024, 1500), Net()), config())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = _checksums(engine.optimizer, list(engine.module.parameters()))
    assert found[0].numel() == -(-1024 * 1500 // NORM_CHUNK) and all(one.numel() for one in found)
    made = Counter[int]()
    for event in sorted(allocations(seen), key=lambda event: event.start_time_ns):
        made[event.extra_fields.ptr] += event.extra_fields.alloc_size
    assert sum(size > 0 for size in made.values()) == 1


def test_a_change_in_the_remainder_of_bf16_weights_is_one() -> None:
    """Of a norm's weights, which are 1, a step of 1e-4 changes no bit of bf16."""
    engine = engine_of(Net(), config(lr=1e-4, weights="bf16+8", weight_decay=0.0))
    before = engine.module.norm.weight.detach().clone()
    step(engine)
    assert torch.equal(before, engine.module.norm.weight)
    assert "moved by step 1;" in engine.leanstate_audit.line


def test_a_step_at_a_rate_of_zero_moves_nothing_and_is_not_looked_at() -> None:
    linear = {"warmup_max_lr": 1e-3, "warmup_num_steps": 4, "warmup_type": "linear"}
    engine = engine_of(Net(), config(scheduler={"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, **linear}}))
    engine.basic_optimizer.param_groups[0]["lr"] = 0.0
    rates = []
    while engine.leanstate_audit.line is None:
        rates.append([group["lr"] for group in engine.basic_optimizer.param_groups])
        step(engine)
    assert len(rates) == 1 or not any(rates[0])
    assert f"moved by step {len(rates)};" in engine.leanstate_audit.line


def test_weights_that_a_rate_cannot_change_are_named(caplog: pytest.LogCaptureFixture) -> None:
    made = config("AdamW", 0) | {"bf16": {"enabled": False}}
    del made["optimizer"]
    model = Net()
    other = [p for name, p in model.named_parameters() if name != "norm.weight"]
    groups = [{"params": other}, {"params": [model.norm.weight], "lr": 1e-30}]
    engine = engine_of(model, made, optimizer=torch.optim.SGD(groups, lr=0.1))
    for _ in range(WATCHED):
        step(engine)
    assert "1 with a gradient, but unchanged so far: norm.weight; optimizer SGD" in engine.leanstate_audit.line
    assert "norm.weight: not changed in 4 steps though there is a gradient" in caplog.text


def test_what_is_in_no_group_or_in_two_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    names = [name for name, _ in model.named_parameters()]
    first, *others = model.parameters()
    engine = engine_of(model, config("AdamW"), model_parameters=others)
    assert f"{names[0]}: trainable, but in no group" in caplog.text
    step(engine)
    assert "each in one group, but 1 in none; 5 moved by step 1; optimizer AdamW" in engine.leanstate_audit.line
    model = Net()
    twice = [*model.parameters(), next(model.parameters())]
    with pytest.raises(UserError, match=f"{names[0]!r} is given to the optimizer twice"):
        engine_of(model, config(), model_parameters=twice)
    model = Net()
    twice = [*model.parameters(), next(model.parameters())]
    with pytest.raises(AssertionError, match=f"{names[0]} occurs multiple times"):  # DeepSpeed's own
        engine_of(model, config("AdamW", 0), model_parameters=twice)


def test_another_optimizer_than_the_json_names_is_told(caplog: pytest.LogCaptureFixture) -> None:
    toolkit.register()
    model, made = Net(), config(stage=0) | {"bf16": {"enabled": False}}
    caplog.set_level(logging.WARNING, "toolkit")
    deepspeed.initialize(model=model, config=made, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert "optimizer.type is AMCS, but an optimizer was handed over, which runs in its place: SGD" in caplog.text
