"""Checkpoints that a run must not take, or not touch: changed ones, newer ones, and what nobody understands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import FACTS, STEP, Call, call, refile, rewrite, stock, whole

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.source import Source
from toolkit.checkpoint.store import Store, name_of
from toolkit.errors import UserError
from toolkit.run.settings import RunSettings
from toolkit.run.start import Start, find_start

# ---- what is not understood -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("newer", [4, 10**9, 3.5, "2", "v3"])
@pytest.mark.parametrize("other_shape", [True, False])
def test_a_checkpoint_of_a_newer_format_is_never_replaced_or_pruned(
    tmp_path: Path, newer: Any, other_shape: bool
) -> None:
    store = whole(tmp_path)
    path = store.path(STEP) / manifests.NAME
    body = {"format": newer, "content": "of another kind"} if other_shape else json.loads(path.read_text())
    path.write_text(json.dumps(body | {"format": newer}))
    before = path.read_bytes()
    with pytest.raises(manifests.NotUnderstood, match="which a newer version wrote"):
        manifests.read(store.path(STEP))
    with pytest.raises(OSError, match="is not replaced"):
        whole(tmp_path)
    assert path.read_bytes() == before and store.steps() == [STEP]
    older = store.path(STEP).rename(store.path(2)) / manifests.NAME
    whole(tmp_path, keep_last=1)
    assert store.steps() == [STEP, 2] and older.read_bytes() == before
    assert "newer version" in str(call("checkpoint", "verify", store.path(2)).output)


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"format": 1}', "\0", "{" * 99_999])
def test_a_folder_that_is_not_understood_is_set_aside(tmp_path: Path, content: str | None) -> None:
    store = Store(tmp_path, keep_last=1)
    for step in (STEP, 2):
        store.path(step).mkdir()
        (store.path(step) / "theirs").write_text("theirs")
        if content is not None:
            (store.path(step) / manifests.NAME).write_text(content)
    others = [tmp_path / name for name in ("backup", "global_step07", "global_step5-best", "global_step٣")]
    for other in others:
        other.mkdir()
    whole(tmp_path, keep_last=1)
    assert Source(store.path(STEP)).digest()
    assert (store.path(2) / "theirs").exists() and all(other.exists() for other in others)
    [aside] = tmp_path.glob(f"global_step{STEP}-aside-*")
    assert (aside / "theirs").read_text() == "theirs"


def test_a_conversion_removes_nothing_that_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        whole(tmp_path / "run", keep_last=9, step=step)
    source = Source(whole(tmp_path / "other").path(STEP))
    convert(source, tmp_path / "run", stage=2, world_size=2)
    assert Store(tmp_path / "run").steps() == [STEP, 3, 2, 1]


def test_one_of_ours_that_is_damaged_is_replaced(tmp_path: Path) -> None:
    store = whole(tmp_path)
    next(store.path(STEP).glob("*optim*")).write_bytes(b"")
    whole(tmp_path)
    assert Source(store.path(STEP)).digest() and not list(tmp_path.glob("*aside*"))


# ---- where a run begins ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def begin(run: Path, resume: str = "auto", **more: Any) -> Start:
    return find_start(RunSettings(resume=resume, **more), run, FACTS["identity"])


def sharded(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda body: body["sharding"].update(changes))


def noted(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda body: body.update(changes))


def linked(folder: Path) -> None:
    outside = (folder / manifests.NAME).rename(folder.parents[2] / "elsewhere")
    (folder / manifests.NAME).symlink_to(outside)


def waiting(folder: Path) -> None:
    (folder / manifests.NAME).unlink()
    os.mkfifo(folder / manifests.NAME)


def of_another_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name(name_of(4)), folder)


def shorter(folder: Path) -> None:
    name = next(path.name for path in folder.glob("*optim*"))
    content = torch.load(folder / name)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop()
    refile(folder, name, content)


DAMAGED: dict[str, Callable[[Path], None]] = {
    "ranks": sharded(world_size=3),
    "stage": sharded(stage="two"),
    "flat tensors": sharded(flat_tensors={"a": [2**70]}),
    "no flat tensors": sharded(flat_tensors=[]),
    "unknown key": sharded(more=1),
    "position": noted(position={"epoch": -1}),
    "identity": noted(identity={"model": "x"}),
    "another part": noted(identity=FACTS["identity"] | {"x": 1}),
    "files": noted(files={}),
    "step": noted(step=-1),
    "another step": noted(step=10**6),
    "a link": linked,
    "no manifest": lambda folder: (folder / manifests.NAME).unlink(),
    "a FIFO": waiting,
    "renamed": of_another_step,
    "content": shorter,
}


@pytest.mark.parametrize("what", DAMAGED)
def test_resume_takes_the_next_older_where_the_newest_was_changed(tmp_path: Path, alone: None, what: str) -> None:
    run = tmp_path / "run"
    whole(run / "checkpoints", step=4)
    store = whole(run / "checkpoints")
    assert begin(run).step == STEP
    DAMAGED[what](store.path(STEP))
    start = begin(run)
    assert start.step == 4 and "taken is global_step4" in start.remarks[0] and start.remarks[0].isprintable()
    assert os.path.lexists(store.path(STEP))
    # Named by its path, a checkpoint may have any name, and may be DeepSpeed's own.
    if what not in ("no manifest", "another step", "renamed"):
        with pytest.raises(UserError):
            begin(tmp_path / "new", str(store.path(STEP)))


def test_resume_refuses_to_continue_past_a_newer_format(tmp_path: Path, alone: None) -> None:
    run = tmp_path / "run"
    whole(run / "checkpoints", step=4)
    store = whole(run / "checkpoints")
    (store.path(STEP) / manifests.NAME).write_text('{"format": 4}')
    for where, resume in ((run, "auto"), (tmp_path / "new", str(run)), (tmp_path / "new", str(store.path(STEP)))):
        with pytest.raises(UserError, match="newer version wrote.*resume with that version"):
            begin(where, resume)


def test_resume_runs_the_code_of_a_checkpoint_only_when_it_is_trusted(tmp_path: Path, alone: None) -> None:
    folder, mark = stock(tmp_path / "theirs" / "global_step5"), tmp_path / "mark"
    (tmp_path / "theirs" / "latest").write_text("global_step5")
    assert begin(tmp_path / "run", str(tmp_path / "theirs")).step == STEP
    file = folder / "mp_rank_00_model_states.pt"
    torch.save(torch.load(file, weights_only=False) | {"x": Call(os.system, f"touch {mark}")}, file)
    for resume in (str(tmp_path / "theirs"), str(folder)):
        with pytest.raises(UserError, match="more than plain data.*--trust-pickle"):
            begin(tmp_path / "run", resume)
    assert not mark.exists()
    assert begin(tmp_path / "run", str(folder), trust_pickle=True).step == STEP and mark.exists()
