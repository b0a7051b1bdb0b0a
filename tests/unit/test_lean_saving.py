"""Saving where memory has no room for copies: training waits, nothing is copied, and the checkpoint is the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import BASE, build, step
from torch import Tensor

from toolkit.checkpoint import files as checkpoint_files
from toolkit.checkpoint.source import Source
from toolkit.checkpoint.store import Store
from toolkit.run.saving import Saver
from toolkit.zero.checkpoint import capture, copied_bytes, load, sharding

PARAMS = {"lr": 1e-2, "total_steps": 100, "compile": False}
CONFIGS = {
    "stage 2, bf16+8": ({"stage": 2}, {"weights": "bf16+8"}),
    "stage 3, bf16+4": ({"stage": 3}, {"weights": "bf16+4", "state_format": "compact"}),
    "stage 1, master weights": ({"stage": 1}, {"weights": "fp32"}),
}


def engine_of(name: str) -> Any:
    zero, params = CONFIGS[name]
    return build(BASE | {"zero_optimization": zero, "optimizer": {"type": "AMCS", "params": PARAMS | params}})


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def everything(engine: Any) -> list[Tensor]:
    held = [x for state in engine.basic_optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return [*held, *(x for x in engine.module.state_dict().values() if x.numel())]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_without_copies_is_the_same(
    name: str, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(name)
    torch.manual_seed(1)
    for _ in range(3):
        step(engine)
    saver = Saver(engine, Store(tmp_path / "copied"))
    saver.now(3, {})
    monkeypatch.setattr("toolkit.memory.machine.unused", lambda: copied_bytes(engine))
    lean = Saver(engine, Store(tmp_path / "lean", keep_last=1))
    with caplog.at_level(logging.WARNING, "toolkit"):
        for number in (3, 4):
            lean.start(number, {})
            assert lean._running is not None and lean._running.done()  # training went on only then
            assert lean.wait() is None and lean.saved == number
    assert sum("training waits while a checkpoint is written" in text for text in caplog.messages) == 1
    before = [x.clone() for x in everything(engine)]
    for folder in (tmp_path / "copied" / "global_step3", tmp_path / "lean" / "global_step4"):
        torch.manual_seed(2)
        step(engine)
        assert not all(torch.equal(x, y) for x, y in zip(everything(engine), before, strict=True))
        load(engine, Source(folder))
        for x, y in zip(everything(engine), before, strict=True):
            assert torch.equal(x, y)
    for one in (saver, lean):
        one.close()
    engine.destroy()


def test_what_a_gpu_holds_is_copied_in_any_case(one_rank: None) -> None:
    """With offload a part lies on the host, or in files, and is copied where there is room."""
    engine = engine_of("stage 2, bf16+8")
    step(engine)
    before = copied_bytes(engine)
    held = next(state for state in engine.basic_optimizer.state.values())
    key, value = next((key, x) for key, x in held.items() if isinstance(x, Tensor))
    held[key] = value.to("meta")
    assert copied_bytes(engine) == before - value.nbytes
    engine.destroy()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_state_is_copied(name: str, one_rank: None, tmp_path: Path) -> None:
    engine = engine_of(name)
    step(engine)
    for copy in (True, False):
        files = capture(engine, sharding(engine).by_name, tmp_path, 1, {}, copy=copy)
        saved = {x.data_ptr() for x in tensors(list(files.values())) if x.numel() >= 256}
        own = {x.data_ptr() for state in engine.basic_optimizer.state.values() for x in tensors(state)}
        large = {x.data_ptr() for x in tensors(engine.basic_optimizer.state) if x.numel() >= 256}
        assert saved.isdisjoint(own) if copy else large <= saved
    engine.destroy()


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    whole = torch.arange(1000, dtype=torch.float32)
    for view in (whole[10:20], whole.view(10, 100)[:, 3], whole[5], whole[:0], whole.to(torch.bfloat16)[2:4]):
        made = checkpoint_files.as_it_lies(view)
        assert torch.equal(made, view) and made.dtype == view.dtype
        assert made.untyped_storage().nbytes() == view.numel() * view.element_size()
    assert checkpoint_files.as_it_lies(whole[10:20]).data_ptr() == whole[10:20].data_ptr()


def test_what_has_two_types_in_one_memory_is_saved(one_rank: None, tmp_path: Path) -> None:
    engine = engine_of("stage 2, bf16+8")
    step(engine)
    words = torch.arange(512, dtype=torch.float32)
    engine.module.register_buffer("words", words)
    engine.module.register_buffer("bits", words.view(torch.int32))
    files = capture(engine, sharding(engine).by_name, tmp_path, 1, {}, copy=False)
    for number, content in enumerate(files.values()):
        checkpoint_files.save(content, tmp_path / str(number), squeezed=False)
    engine.destroy()
