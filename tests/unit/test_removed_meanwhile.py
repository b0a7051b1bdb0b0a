"""A checkpoint that its run removes (--keep-last) while a command reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import call, whole

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint import universal
from toolkit.checkpoint.source import Source
from toolkit.checkpoint.store import Store, name_of
from toolkit.commands import checkpoint as commands
from toolkit.commands.checkpoint import find
from toolkit.commands.sample import opened_run
from toolkit.errors import UserError
from toolkit.inference import opened


@pytest.fixture
def run(tmp_path: Path) -> Path:
    whole(tmp_path / "run" / "checkpoints", step=210)
    return tmp_path / "run"


@pytest.fixture
def newest_goes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes the run save one more checkpoint and remove the one that is opened, so many times; gives those opened."""

    def arrange(run: Path, times: int = 1, owner: Any = universal, name: str = "open_checkpoint") -> list[str]:
        reader, opened = getattr(owner, name), []

        def reads(folder: Path, *arguments: Any, **options: Any) -> Any:
            opened.append(folder.name)
            if len(opened) <= times:
                whole(run / "checkpoints", keep_last=1, step=210 + 10 * len(opened))
                assert not folder.exists()
            return reader(folder, *arguments, **options)

        monkeypatch.setattr(owner, name, reads)
        return opened

    return arrange


@pytest.mark.parametrize(
    "line", [("inspect",), ("convert", "--out", "new", "--zero-stage", 2), ("convert", "--out", "new", "--universal")]
)
def test_the_newest_is_chosen_again(
    run: Path, newest_goes: Any, line: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    opened = newest_goes(run, times=2)
    done = call("checkpoint", line[0], run, *line[1:])
    assert done.exit_code == 0, done.output
    assert opened == ["global_step210", "global_step220", "global_step230"]


@pytest.mark.parametrize("more", [[], ["--universal"]])
def test_what_was_written_of_one_that_went_is_in_nobodys_way(
    run: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    begun = 0

    def kept(of: Source) -> Any:
        nonlocal begun
        begun += 1
        if begun == 1:
            whole(run / "checkpoints", keep_last=1, step=220)
            raise UserError(f"{of.folder / 'tokenizer.json'} is missing")
        return {}

    monkeypatch.setattr(Source, "model_files", kept)  # these are read last
    done = call("checkpoint", "convert", run, "--out", run.parent / "to", *more)
    assert done.exit_code == 0 and begun == 2, done.output
    assert manifests.read(find(run.parent / "to")).step == 220


def test_one_that_was_named_is_said_to_be_gone(run: Path, newest_goes: Any) -> None:
    named = run / "checkpoints" / name_of(210)
    newest_goes(run)
    done = call("checkpoint", "inspect", named)
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == f"{named} was removed while it was read."


def test_it_is_not_tried_for_ever(run: Path, newest_goes: Any) -> None:
    opened = newest_goes(run, times=100)
    done = call("checkpoint", "inspect", run)
    assert isinstance(done.exception, UserError) and len(opened) == commands._TRIES
    assert f"newest checkpoint of {run} was removed" in str(done.exception) and "--keep-last" in str(done.exception)


def test_an_error_of_a_checkpoint_that_is_there_stays(run: Path) -> None:
    for file in (run / "checkpoints" / name_of(210)).glob("*optim_states.pt"):
        file.unlink()
    done = call("checkpoint", "inspect", run)
    assert isinstance(done.exception, UserError) and "optim_states.pt is missing" in str(done.exception)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_verify_leaves_out_what_is_gone(run: Path, newest_goes: Any, more: list[str]) -> None:
    newest_goes(run)
    done = call("checkpoint", "verify", run, *more)
    assert done.exit_code == 0, done.output
    if more:
        assert json.loads(done.output)["problems"] == {name_of(220): []}
    else:
        assert done.output == "global_step210: removed while it was read\nglobal_step220: intact\n"


def test_verify_of_one_that_is_gone(run: Path, newest_goes: Any) -> None:
    newest_goes(run)
    done = call("checkpoint", "verify", run / "checkpoints" / name_of(210))
    assert isinstance(done.exception, UserError) and "was removed while it was read" in str(done.exception)


@pytest.mark.parametrize("named", [False, True])
def test_a_model_to_sample_from(
    run: Path, newest_goes: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], named: bool
) -> None:
    """As `toolkit sample` and `toolkit eval` open it."""

    def open_model(folder: Path, base: Path | None) -> Any:
        if not folder.exists():  # as transformers has it
            raise UserError(f"'{folder}/config.json' is not a usable model configuration: Repo id must be in the form")
        return folder.name

    monkeypatch.setattr(opened, "open_model", open_model)
    newest_goes(run, owner=opened, name="open_model")
    if named:
        with pytest.raises(UserError, match="global_step210 was removed while it was read"):
            opened_run(run, 210, None, None)
        return
    assert opened_run(run, None, None, None) == name_of(220)
    assert "global_step220, which is newer" in capsys.readouterr().err


def test_a_model_of_which_the_tokenizer_is_gone_is_not_used(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer loads also where some of its files are missing, and is another one then."""
    folder = Store(run / "checkpoints").path(210)
    monkeypatch.setattr(opened, "load_model", lambda source: torch.nn.Linear(1, 1))
    monkeypatch.setattr(opened, "complete", lambda hf, *others: hf)
    monkeypatch.setattr(opened.data, "load_tokenizer", lambda name: shutil.rmtree(folder))
    with pytest.raises(UserError, match="was removed while it was read"):
        opened._of_a_checkpoint(folder, None)
