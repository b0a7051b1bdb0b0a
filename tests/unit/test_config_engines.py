"""Valid means it runs: what `validate` lets through, `initialize` builds, and it makes a step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from config_space import every_pair, sample
from deepspeed.accelerator import get_accelerator
from engines import BASE, Net, build, step

import toolkit
from toolkit.config import validate
from toolkit.errors import UserError

pytestmark = pytest.mark.usefixtures("one_rank", "one_thread")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's monitors write where the process is."""
    monkeypatch.chdir(tmp_path)


def failures(configs: Iterable[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """How many configs passed validation, and what went wrong with those that did."""
    from deepspeed.runtime import torch_autocast

    built, failed = 0, []
    for config in configs:
        try:
            validate(config, origin="config", world_size=1)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        built += 1
        monkeypatch.setattr(torch_autocast, "TORCH_AUTOCAST_INITIALIZED", False)  # another run's, in one process
        try:
            engine = build(config)
            try:
                assert torch.isfinite(torch.tensor(step(engine)))
            finally:
                engine.destroy()
        except Exception as error:
            failed.append(f"{json.dumps(config)}: {type(error).__name__}: {error}")
    return built, failed


def compiles(config: dict[str, Any]) -> bool:
    """DeepSpeed's own optimizers compile, most of them an extension for minutes."""
    optimizer = config.get("optimizer", {})
    own = optimizer.get("type") in ("Adam", "AdamW", "Lion", "Lamb", "Adagrad", "Muon")
    return own and not optimizer.get("params", {}).get("torch_adam")


def test_what_is_valid_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    built, failed = failures((config for config in sample(60, seed=1) if not compiles(config)), monkeypatch)
    assert not failed, "\n".join(failed)
    # A CPU without AVX-512 has no fp16 under DeepSpeed: what asks for it is refused there.
    assert built > (11 if get_accelerator().is_fp16_supported() else 6)


@pytest.mark.slow
def test_every_setting_that_is_valid_runs_at_every_stage(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    built, failed = failures(every_pair(), monkeypatch)
    assert not failed, "\n".join(failed)
    assert built > 300


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_combinations_that_are_valid_run(
    seed: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _, failed = failures(sample(500, seed), monkeypatch)
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("model", [None, {}, Net])
def test_a_model_that_is_none_is_one_sentence(model: Any) -> None:
    with pytest.raises(UserError, match="model is .*, but must be the torch.nn.Module to train"):
        toolkit.initialize(model=model, config="amcs_zero2")


def test_zero_without_an_optimizer_is_one_sentence() -> None:
    config = BASE | {"zero_optimization": {"stage": 2}}
    validate(config, origin="my.json")
    with pytest.raises(UserError, match="stage 2 shards an optimizer's state, and there is no optimizer"):
        build(config)
    model = Net()
    engine, *_ = toolkit.initialize(model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    step(engine)
    engine.destroy()


def test_total_steps_is_asked_for_before_anything_is_built() -> None:
    from toolkit.optim import AMCS

    config = BASE | {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AMCS"}}
    validate(config, origin="my.json")
    validate(config, origin="my.json", world_size=1, total_steps=5)
    for check in (lambda: validate(config, origin="config", world_size=1), lambda: build(config)):
        with pytest.raises(UserError, match="config: optimizer.params: AMCS: total_steps is required"):
            check()
    parameters = list(Net().parameters())
    with pytest.raises(UserError, match="total_steps is required"):
        AMCS(parameters)
    with pytest.raises(UserError, match="total_steps is required"):
        AMCS([{"params": parameters, "alpha": "linear"}], alpha=0.5)


def test_comments_reach_no_constructor() -> None:
    params = {"lr": 1e-3, "_lr": "was 2e-3", "total_steps": 4, "compile": False}
    config = BASE | {
        "//": "a test",
        "optimizer": {"type": "AMCS", "params": params, "_": 1},
        "scheduler": {"type": "StepLR", "params": {"step_size": 1, "//": "halves"}},
        "zero_optimization": {"stage": 2, "_why": "it fits", "offload_optimizer": {"device": "none", "//": 0}},
    }
    engine = build(config)
    step(engine)
    engine.destroy()
