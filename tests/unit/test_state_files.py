"""State in files: tensors as any other, of which the process holds no more than it works on."""

from __future__ import annotations

import gc
import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import pytest
import torch
from engines import BASE, build, step
from torch import Tensor

import toolkit
from toolkit.checkpoint.source import Source
from toolkit.checkpoint.store import Store
from toolkit.config import remarks, validate
from toolkit.errors import UserError
from toolkit.optim import AMCS, param_groups
from toolkit.run.saving import Saver
from toolkit.state import files
from toolkit.state.files import StateFiles, bring_in, let_go, lies_in_file, read_ahead
from toolkit.zero.checkpoint import load
from toolkit.zero.inventory import inventory

PARAMS = {"lr": 1e-2, "total_steps": 100, "compile": False}
WANTED = {
    "codes": ((3, 256), torch.int8),
    "scales": ((3, 1), torch.float32),
    "none": ((0, 256), torch.uint8),
    "m": ((5, 256), torch.bfloat16),
}


def config(device: str, folder: Path, stage: int, **params: Any) -> dict[str, Any]:
    offload = {"device": device, **({"nvme_path": str(folder)} if device == "nvme" else {})}
    zero = {"stage": stage, "offload_optimizer": offload}
    top = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": zero}
    return BASE | top | {"optimizer": {"type": "AMCS", "params": PARAMS | params}}


def states(engine: Any) -> list[Tensor]:
    held = engine.basic_optimizer.state.values()
    return [x for state in held for x in state.values() if isinstance(x, Tensor)]


def test_tensors_are_zeros_of_their_own_in_one_file(tmp_path: Path) -> None:
    made = StateFiles(tmp_path).zeros(WANTED)
    assert {key: ((x.shape[0], x.shape[1]), x.dtype) for key, x in made.items()} == WANTED
    assert not list(tmp_path.iterdir()), "the file has no name"
    assert not any(x.any() for x in made.values())
    for value, x in enumerate(made.values(), start=1):
        x.fill_(value)
    for value, x in enumerate(made.values(), start=1):
        assert (x == value).all()
        assert x.untyped_storage().nbytes() == x.nbytes
        assert lies_in_file(x) == lies_in_file(x[1:]) == bool(x.numel())
    assert not lies_in_file(torch.zeros(3))


def test_what_is_let_go_keeps_its_values(tmp_path: Path) -> None:
    """A slice begins and ends within a page."""
    made = StateFiles(tmp_path).zeros({"codes": ((4000, 256), torch.uint8), "scales": ((4000, 1), torch.float32)})
    for x in made.values():
        x.copy_(torch.arange(4000)[:, None] % 251)
    read_ahead(x[17:33] for x in made.values())
    bring_in(x[17:1234] for x in made.values())
    let_go(x[17:1234] for x in made.values())
    let_go([torch.ones(2)])
    for x in made.values():
        x[20] += 1
        expected = torch.arange(4000) % 251
        expected[20] += 1
        assert torch.equal(x[:, 0].long(), expected)


def test_the_process_holds_no_more_than_it_works_on(tmp_path: Path) -> None:
    [state] = StateFiles(tmp_path).zeros({"codes": ((2**18, 256), torch.uint8)}).values()
    before = psutil.Process().memory_info().rss
    for part in state.split(2**14):
        part.fill_(7)
        let_go([part])
    assert psutil.Process().memory_info().rss - before < state.nbytes / 4
    assert bool((state == 7).all())


def test_the_disk_has_its_room_back(tmp_path: Path) -> None:
    def used() -> int:
        found = os.statvfs(tmp_path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    before = used()
    made = StateFiles(tmp_path).zeros({"codes": ((2**18, 256), torch.uint8)})
    held = used() - before
    assert held > 2**25
    del made
    gc.collect()
    assert used() - before < held - 2**25


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may be larger than a megabyte: what a full disk says."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_found_at_once(tmp_path: Path, small_files: None) -> None:
    with pytest.raises(
        UserError, match=r"nvme_path '.*' does not take 0\.00201 GB more of the optimizer's state: File too"
    ):
        StateFiles(tmp_path).zeros({"codes": ((7836, 256), torch.uint8)})


def test_a_folder_that_has_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    made = StateFiles(tmp_path / "scratch")
    (tmp_path / "scratch").rmdir()
    with pytest.raises(UserError, match="nvme_path '.*scratch' does not take .*: No such file or directory"):
        made.zeros(WANTED)


def test_a_folder_is_the_same_when_the_program_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    made = StateFiles(Path("scratch"))
    monkeypatch.chdir("/")
    assert lies_in_file(made.zeros(WANTED)["codes"])


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_that_is_handed_over_has_its_state_there(stage: int, one_rank: None, tmp_path: Path) -> None:
    def mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    made = config("nvme", tmp_path, stage)
    del made["optimizer"]
    model = torch.nn.Linear(32, 16)
    engine, *_ = toolkit.initialize(model=model, config=made, optimizer=AMCS(param_groups(model), **PARAMS))
    engine.backward(engine(torch.randn(1, 32, dtype=torch.bfloat16)).float().square().mean())
    engine.step()
    assert states(engine) and all(lies_in_file(x) for x in states(engine)) and mapped()
    engine.destroy()
    del engine, model, _
    assert stage == 3 or not mapped()  # at stage 3 hooks of DeepSpeed's keep an engine that has gone


def test_a_folder_in_memory_saves_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files._file_system(Path("/proc")) == "proc"
    monkeypatch.setattr(files, "_file_system", lambda folder: "tmpfs")
    with caplog.at_level(logging.WARNING, "toolkit"):
        StateFiles(tmp_path)
    assert "is of type tmpfs, which lies in memory itself" in caplog.text


def test_other_folders_are_refused(tmp_path: Path) -> None:
    made = config("nvme", tmp_path / "absent", 3)
    with pytest.raises(UserError, match="nvme_path is '.*absent', but must be a folder that exists"):
        StateFiles(tmp_path / "absent")
    place = r"my.json: zero_optimization\.offload_optimizer\.nvme_path"
    with pytest.raises(UserError, match=rf"{place} is '.*absent', but must be a folder that exists\."):
        validate(made, origin="my.json", world_size=1)
    made["zero_optimization"]["offload_optimizer"]["nvme_path"] = "/proc"
    with pytest.raises(UserError, match=rf"{place} is '/proc', but it takes no files: "):
        validate(made, origin="my.json", world_size=1)


def test_a_plain_deepspeed_initialize_needs_a_folder_too(one_rank: None, tmp_path: Path) -> None:
    made = config("nvme", tmp_path, 2)
    del made["zero_optimization"]["offload_optimizer"]["nvme_path"]
    toolkit.register()
    with pytest.raises(UserError, match="needs nvme_path beside it"):
        deepspeed.initialize(model=torch.nn.Linear(32, 16), config=made)


def test_what_is_for_deepspeeds_swapping_is_named(tmp_path: Path) -> None:
    made = config("nvme", tmp_path, 3)
    assert not remarks(made)
    made["zero_optimization"]["offload_optimizer"] |= {"buffer_count": 4, "pin_memory": True}
    [one] = remarks(made | {"aio": {"block_size": 2**20}})
    assert one.startswith("zero_optimization.offload_optimizer.buffer_count, aio have no effect: the state of AMCS")


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_has_the_same_bits_as_with_state_in_memory(
    stage: int, released: bool, one_rank: None, tmp_path: Path
) -> None:
    found = {}
    for device in ("cpu", "nvme"):
        engine = build(config(device, tmp_path, stage, release_gradients=released))
        torch.manual_seed(1)
        losses = [step(engine) for _ in range(3)]
        held = [x.clone() for x in states(engine)]
        assert all(lies_in_file(x) == (device == "nvme") for x in states(engine))
        named = {category for category, _, _ in inventory(engine)}
        assert ("m_fast" in named) == (device == "cpu"), "a disk is no memory"
        found[device] = (losses, held, engine.basic_optimizer.state_bytes())
        engine.destroy()
    losses, held, sizes = found["cpu"]
    assert found["nvme"][0] == losses and found["nvme"][2] == sizes and sizes["m_fast"]
    for x, y in zip(found["nvme"][1], held, strict=True):
        assert torch.equal(x, y)


def test_weights_that_are_stepped_on_in_the_backward_pass_are_not_written_to_from_outside(
    one_rank: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On the host they are the model's own; a copy would be compared with the model before each step."""
    made = config("nvme", tmp_path, 3, release_gradients=True)
    made["zero_optimization"]["offload_param"] = {"device": "cpu"}
    engine, *_ = toolkit.initialize(model=torch.nn.Linear(32, 16), config=made)  # the matrix is whole blocks
    with caplog.at_level(logging.WARNING, "toolkit"):
        for _ in range(3):
            engine.backward(engine(torch.randn(1, 32, dtype=torch.bfloat16)).float().square().mean())
            engine.step()
    assert "written to from outside" not in caplog.text
    engine.destroy()


@pytest.mark.parametrize(("there", "here"), [("nvme", "nvme"), ("nvme", "cpu"), ("cpu", "nvme")])
def test_a_checkpoint_is_the_same_wherever_state_lies(there: str, here: str, one_rank: None, tmp_path: Path) -> None:
    engine = build(config(there, tmp_path, 3))
    for _ in range(2):
        step(engine)
    saver = Saver(engine, Store(tmp_path / "saved"))
    saver.now(2, {})
    saver.close()
    before = [x.clone() for x in states(engine)]
    engine.destroy()
    other = build(config(here, tmp_path, 3))
    load(other, Source(tmp_path / "saved" / "global_step2"))
    assert all(lies_in_file(x) == (here == "nvme") for x in states(other))
    for x, y in zip(states(other), before, strict=True):
        assert torch.equal(x, y)
    step(other)
    other.destroy()


def test_optimizers_of_ones_own_loop_keep_state_in_memory() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 256))
    optimizer = AMCS([weight], **PARAMS)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert not any(lies_in_file(x) for x in optimizer.state[weight].values() if isinstance(x, Tensor))
