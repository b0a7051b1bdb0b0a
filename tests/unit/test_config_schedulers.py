"""Schedulers named in a JSON: what is refused, and that the rates of torch's and DeepSpeed's classes really are set."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from engines import BASE, build, step

from toolkit.config import validate
from toolkit.config.signatures import torch_names
from toolkit.errors import UserError
from toolkit.run.merge import merge_flags
from toolkit.run.settings import RunSettings

# Of every scheduler of torch that a JSON can describe, arguments that move the rate within a few steps.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ConstantLR": {"factor": 0.5, "total_iters": 2},
    "CosineAnnealingLR": {"T_max": 6, "eta_min": 1e-5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-3, "step_size_up": 3, "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.5},
    "LinearLR": {"start_factor": 0.25, "total_iters": 3},
    "MultiStepLR": {"milestones": [2, 3], "gamma": 0.1},
    "OneCycleLR": {"max_lr": 1e-2, "total_steps": 6, "cycle_momentum": False},
    "PolynomialLR": {"total_iters": 5, "power": 2.0},
    "StepLR": {"step_size": 2, "gamma": 0.5},
}
NOT_IN_A_JSON = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau"}
STEPS = 5
LR = 1e-3


OWN: dict[str, dict[str, Any]] = {
    "AMCS": {"total_steps": 10, "compile": False},
    "AdamW": {"torch_adam": True},  # DeepSpeed's own is compiled for two minutes
}


def config(stage: int, optimizer: str, scheduler: dict[str, Any] | None, **top: Any) -> dict[str, Any]:
    params = {"lr": LR} | OWN.get(optimizer, {})
    made = BASE | {
        "zero_optimization": {"stage": stage, **top.pop("zero", {})},
        "optimizer": {"type": optimizer, "params": params},
    }
    return made | ({} if scheduler is None else {"scheduler": scheduler}) | top


def refusal(scheduler: dict[str, Any], optimizer: str = "AMCS", world_size: int | None = 1) -> str:
    with pytest.raises(UserError) as caught:
        validate(config(2, optimizer, scheduler), origin="my.json", world_size=world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_scheduler_of_torch_is_either_tried_or_refused() -> None:
    assert set(torch_names("torch.optim.lr_scheduler", "LRScheduler")) == ARGUMENTS.keys() | NOT_IN_A_JSON


@pytest.mark.parametrize("kind", sorted(NOT_IN_A_JSON))
def test_what_no_json_can_describe_is_refused(kind: str) -> None:
    assert f"scheduler.type '{kind}'" in refusal({"type": kind, "params": {"factor": 0.5}})


def reference(kind: str, params: dict[str, Any]) -> list[float]:
    """The rate before each step, and the last one, of the same scheduler in a plain loop."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, **params)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


def check_rates(settings: dict[str, Any], kind: str, params: dict[str, Any]) -> None:
    expected = reference(kind, params)
    engine = build(settings)
    try:
        for rate in expected[:-1]:
            assert engine.get_lr() == pytest.approx([rate] * len(engine.get_lr()))
            before = [p.detach().clone() for p in engine.module.parameters()]
            step(engine)
            # A scheduler that is stepped is of use only if the optimizer reads the groups that it writes.
            moved = engine.zero_optimization_stage() == 3 or any(
                not torch.equal(p, old) for p, old in zip(engine.module.parameters(), before, strict=True)
            )
            assert moved == (rate > 0 or engine.zero_optimization_stage() == 3)
        assert engine.get_lr() == pytest.approx([expected[-1]] * len(engine.get_lr()))
    finally:
        engine.destroy()


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_scheduler_of_torch_sets_the_rates_at_every_stage(kind: str, one_rank: None, one_thread: None) -> None:
    scheduler = {"type": kind, "params": ARGUMENTS[kind]}
    stages = (0, 1, 2, 3) if kind in ("StepLR", "OneCycleLR") else (3,)
    for stage in stages:
        check_rates(config(stage, "AMCS", scheduler), kind, ARGUMENTS[kind])


def test_a_scheduler_of_torch_sets_the_rates_around_every_wrapper(
    one_rank: None, one_thread: None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """An optimizer of torch, offload, fp16 at stage 0 and above, and the wrapper for fp32 gradients in bf16."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    scheduler = {"type": "StepLR", "params": ARGUMENTS["StepLR"]}
    fp16 = {"bf16": {"enabled": False}, "fp16": {"enabled": True, "initial_scale_power": 4}}
    on_host = {"offload_optimizer": {"device": "cpu"}}
    for settings in (
        config(1, "AdamW", scheduler),
        config(3, "AdamW", scheduler),
        config(0, "AdamW", scheduler, bf16={"enabled": False}),
        config(1, "AdamW", scheduler, data_types={"grad_accum_dtype": "fp32"}),
        config(2, "AMCS", scheduler, zero=on_host),
        config(0, "AMCS", scheduler, **fp16),
        config(2, "AMCS", scheduler, **fp16),
    ):
        check_rates(settings, "StepLR", ARGUMENTS["StepLR"])
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_a_scheduler_without_params_has_its_defaults(one_rank: None, one_thread: None) -> None:
    engine = build(config(2, "AMCS", {"type": "WarmupLR"}))
    assert engine.get_lr()[0] == 0.0
    for _ in range(2):
        step(engine)
    assert 0.0 < engine.get_lr()[0] < LR
    engine.destroy()


@pytest.mark.parametrize(
    ("scheduler", "sentence"),
    [
        ({"type": "CosineAnnealingLR"}, "scheduler.params lacks 'T_max', which CosineAnnealingLR needs"),
        ({"type": "OneCycleLR", "params": {"max_lr": 1e-3, "cycle_momentum": False}}, "lacks 'total_steps'"),
        ({"type": "StepLR", "params": {"stepsize": 2}}, "Did you mean 'step_size'?"),
        ({"type": "CosineAnnealingLR", "params": {"T_max": 0}}, "CosineAnnealingLR refuses"),
        ({"type": "StepLR", "params": {"step_size": 0}}, "StepLR refuses"),
        ({"type": "StepLR", "params": {"step_size": "ten"}}, "StepLR refuses"),
        ({"type": "ExponentialLR", "params": {"gamma": -0.5}}, "scheduler.params.gamma is -0.5, but must be finite"),
        ({"type": "CosineAnnealingLR", "params": {"T_max": 5, "eta_min": -1.0}}, "eta_min is -1.0, but must be finite"),
        ({"type": "LinearLR", "params": {"start_factor": 2.0}}, "LinearLR refuses"),
        ({"type": "StepLR", "params": {"step_size": 2, "last_epoch": 3}}, "a schedule begins at the run's first step"),
        ({"type": "CyclicLR", "params": {"base_lr": 0.1, "max_lr": 0.2, "scale_fn": "x"}}, "takes a function as"),
        (
            {"type": "CyclicLR", "params": {"base_lr": 0.1, "max_lr": 0.2}},
            "cycle_momentum overwrites the betas of AMCS",
        ),
        ({"type": "OneCycleLR", "params": {"max_lr": 0.1, "total_steps": 9}}, "overwrites the betas of AMCS"),
        ({"type": "LRScheduler"}, "scheduler.type 'LRScheduler' is unknown"),
        ({"type": "_LRScheduler"}, "scheduler.type '_LRScheduler' is unknown"),
        (
            {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_momentum": False}},
            "",
        ),
        ({"type": "LRRangeTest", "params": {"lr_range_test_step_size": 0.5}}, "LRRangeTest refuses"),
    ],
)
def test_a_schedule_that_cannot_run_is_one_sentence(scheduler: dict[str, Any], sentence: str) -> None:
    if not sentence:
        validate(config(2, "AMCS", scheduler), origin="my.json", world_size=1)
        return
    assert sentence in refusal(scheduler)


def test_momentum_that_an_optimizer_lacks_is_not_cycled() -> None:
    cyclic = {"type": "CyclicLR", "params": {"base_lr": 1e-4, "max_lr": 1e-3}}
    validate(config(2, "AdamW", cyclic), origin="my.json", world_size=1)
    assert "optimizer must support momentum" in refusal(cyclic, "Adagrad")


def test_lists_by_group_must_be_of_one_length() -> None:
    lists = {"base_lr": [1e-4, 1e-4], "max_lr": [1e-3, 1e-3, 1e-3], "cycle_momentum": False}
    assert "must have the same length" in refusal({"type": "CyclicLR", "params": lists})


# -------------------------------------------------------------------------------------------- beside the flags


def merged(kind: str, params: dict[str, Any], **flags: Any) -> tuple[dict[str, Any], list[str]]:
    settings = config(2, "AMCS", {"type": kind, "params": params})
    result, _, remarks = merge_flags(settings, RunSettings(**flags), world_size=1)
    return result, remarks


def test_lr_is_the_rate_that_the_schedule_begins_from_or_its_peak() -> None:
    result, _ = merged("StepLR", {"step_size": 2}, lr=0.5)
    assert result["optimizer"]["params"]["lr"] == 0.5 and "lr" not in result["scheduler"]["params"]
    result, _ = merged("OneCycleLR", {"max_lr": 0.1}, lr=0.5)
    assert result["scheduler"]["params"]["max_lr"] == 0.5


@pytest.mark.parametrize(
    ("kind", "params", "remark"),
    [
        ("CosineAnnealingLR", {"T_max": 100}, None),
        ("CosineAnnealingLR", {"T_max": "auto"}, None),
        ("CosineAnnealingLR", {}, None),
        ("CosineAnnealingLR", {"T_max": 60}, "T_max is 60 and the run takes 100 steps: from step 61 on the rate rises"),
        ("CosineAnnealingLR", {"T_max": 600}, "T_max is 600 and the run takes 100 steps: it ends before the schedule"),
        ("PolynomialLR", {}, "takes 5 steps and the run takes 100 steps: from step 6 on the rate is 0"),
        (
            "LinearLR",
            {"total_iters": 10},
            "total_iters is 10 and the run takes 100 steps: from step 11 on the rate stays",
        ),
        ("OneCycleLR", {"max_lr": 0.1, "epochs": 2, "steps_per_epoch": 80}, "takes 160 steps and the run takes 100"),
        ("StepLR", {"step_size": 2}, None),
    ],
)
def test_a_length_that_is_not_the_runs_is_said(kind: str, params: dict[str, Any], remark: str | None) -> None:
    result, remarks = merged(kind, params, steps=100)
    if remark is None:
        assert remarks == []
        assert result["scheduler"]["params"].get("T_max", 100) == 100
    else:
        assert len(remarks) == 1 and remark in remarks[0]


def test_a_schedule_that_would_end_the_run_by_an_error_is_refused() -> None:
    with pytest.raises(UserError, match="total_steps is 60, and OneCycleLR cannot continue after that; the run"):
        merged("OneCycleLR", {"max_lr": 0.1, "total_steps": 60}, steps=100)
    with pytest.raises(UserError, match="--warmup does not apply to scheduler 'CosineAnnealingLR'"):
        merged("CosineAnnealingLR", {"T_max": 100}, steps=100, warmup=0.1)


def test_a_rate_of_6e4_is_remarked_upon(caplog: pytest.LogCaptureFixture, one_rank: None, one_thread: None) -> None:
    settings = config(2, "AMCS", None)
    settings["optimizer"]["params"]["lr"] = 6e4
    with caplog.at_level(logging.WARNING, "toolkit"):
        build(settings).destroy()
    assert "the learning rate is 60000" in caplog.text and "6e-4 meant" in caplog.text
    caplog.clear()
    build(config(2, "AMCS", None)).destroy()
    assert "learning rate" not in caplog.text
