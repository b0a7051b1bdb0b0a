"""The step compiled before it is needed: what it leaves alone, and when a process is started for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.optim import AMCS, SOAM, inductor
from toolkit.optim import kernel as step
from toolkit.optim.inductor import first_of_all
from toolkit.optim.warm import kinds, warm
from toolkit.run import compiling
from toolkit.run.settings import RunSettings


def test_matrices_and_vectors_are_compiled_and_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(step, "compile_blocks", lambda *args: compiled.append(args) or inductor.compile_blocks(*args))
    step.step_function.cache_clear()
    parameters = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((300, 4), (4, 300), (300,))]
    optimizer = SOAM(parameters)
    groups = kinds(optimizer, torch.bfloat16)
    assert [dict(group["state_format"]) for group in groups] == [{"m": "8bit", "v": "8bit"}, {"m": "fp32", "v": "fp32"}]
    assert [warm(optimizer, group, torch.bfloat16, torch.bfloat16, "cpu") for group in groups] == [None, None]
    assert all((parameter == 1).all() for parameter in parameters) and not optimizer.state
    assert len(compiled) == 2
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(compiled) == 2, "the step needed no compiler"
    assert all(held["step"] == 1 for held in optimizer.state.values())


def test_an_eager_optimizer_has_nothing_to_compile() -> None:
    assert kinds(AMCS([nn.Parameter(torch.ones(4, 4))], alpha=0.5, compile=False), torch.float32) == []


@pytest.mark.parametrize(("local_rank", "seconds", "said"), [("0", 0.5, True), ("0", 0.0, False), ("1", 0.5, False)])
def test_a_first_call_that_takes_long_says_why(
    local_rank: str, seconds: float, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(step, "PATIENCE_SECONDS", 0.1)
    with step._patience("a_step"):
        time.sleep(seconds)
    time.sleep(0.3)
    assert ("compiling the optimizer step a_step" in caplog.text) is said


def test_one_process_compiles_while_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    done = []

    def compile_too(work: str) -> None:
        with first_of_all(work):
            done.append(work)

    with first_of_all("a kernel"):
        waiting = threading.Thread(target=compile_too, args=["a kernel"])
        waiting.start()
        compile_too("another kernel")
        waiting.join(0.3)
        assert waiting.is_alive() and done == ["another kernel"]
    waiting.join(10)
    assert done == ["another kernel", "a kernel"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    compile_too("where nothing can be locked")
    assert len(done) == 3


def order(**settings: Any) -> dict[str, Any] | None:
    return compiling._order(RunSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "dtypes", "device"),
    [
        ({"config": "amcs_zero2"}, ["bf16", "bf16"], None),
        ({"config": "soam_zero3_offload"}, ["bf16", "bf16"], "cpu"),
        ({"overrides": ["optimizer.params.weights=fp32"]}, ["fp32", "bf16"], None),
        ({"overrides": ['data_types={"grad_accum_dtype": "fp32"}']}, ["bf16", "fp32"], None),
        ({"overrides": ["bf16.enabled=false"]}, ["fp32", "fp32"], None),
        ({"overrides": ["zero_optimization.stage=0"]}, ["fp32", "fp32"], None),
    ],
)
def test_what_is_compiled_follows_from_the_json(
    settings: dict[str, Any], dtypes: list[str], device: str | None
) -> None:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    made = order(**settings)
    assert made is not None and made["dtypes"] == dtypes
    assert made["device"] == (device or (accelerator.type if accelerator is not None else "cpu"))


def test_the_same_code_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    threads = torch.get_num_threads()
    first, again = order(), order(lr=1e-5, steps=7)
    assert first is not None and again is not None
    mark = compiling._mark(first)
    assert mark.parent == tmp_path and compiling._mark(again) == mark
    other = [order(overrides=[f"optimizer.params.{key}"]) for key in ("state_format=compact", "mode=single")]
    marks = {compiling._mark(one) for one in other if one is not None}
    torch.set_num_threads(threads + 1)
    marks.add(compiling._mark(first))
    torch.set_num_threads(threads)
    assert len(marks | {mark}) == 4
    mark.touch()
    assert compiling.begin(RunSettings()) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"config": "adamw_zero2"},
        {"overrides": ["optimizer.params.compile=false"]},
        {"config": "no such config"},
        {"overrides": ["optimizer.params=3"]},
        {"overrides": ["zero_optimization=3"]},
    ],
)
def test_no_process_where_it_would_be_of_no_use(settings: dict[str, Any]) -> None:
    assert compiling.begin(RunSettings(**settings)) is None


def test_one_process_for_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert compiling.begin(RunSettings()) is None
