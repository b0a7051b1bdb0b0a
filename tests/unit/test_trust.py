"""Folders that somebody else wrote: their code does not run, their names lead nowhere, and what is wrong is said."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from deepspeed.runtime.zero.config import ZeroStageEnum
from small_checkpoints import STEP, Call, call, cut, refile, refused, rewrite, stock, use

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint import universal
from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.source import Source
from toolkit.checkpoint.store import name_of
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.commands.checkpoint import find
from toolkit.errors import UserError

LAYOUTS = [(1, 1), (2, 2), (3, 2), (0, 0)]
"""Stage and ranks; 0: the universal layout."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    root = tmp_path_factory.mktemp("made")

    @functools.cache
    def folder(stage: int, ranks: int) -> Path:
        if stage:
            return cut(root / f"{stage}-{ranks}", stage, ranks)
        universal.write(Source(cut(root / "origin", 1, 1)), root / "universal" / name_of(STEP))
        return root / "universal" / name_of(STEP)

    return folder


@pytest.fixture
def copied(made: Callable[[int, int], Path], tmp_path: Path) -> Callable[[int, int], Path]:
    def copy(stage: int, ranks: int) -> Path:
        return Path(shutil.copytree(made(stage, ranks), tmp_path / f"{stage}-{ranks}" / name_of(STEP)))

    return copy


@pytest.fixture
def little_memory() -> Iterator[None]:
    """One gigabyte more than there is: whoever takes a size from a file at its word fails here."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(("stage", "ranks"), LAYOUTS)
def test_a_checkpoint_that_nobody_touched_is_read(
    made: Callable[[int, int], Path], tmp_path: Path, stage: int, ranks: int
) -> None:
    use(made(stage, ranks), tmp_path)
    assert open_checkpoint(made(stage, ranks)).digest() == Source(made(1, 1)).digest()
    assert call("checkpoint", "verify", made(stage, ranks)).output.strip().endswith(": intact")
    convert(open_checkpoint(made(0, 0)), tmp_path / "back", stage=3, world_size=2)
    assert Source(tmp_path / "back" / name_of(STEP)).digest() == Source(made(1, 1)).digest()


# ---- code -----------------------------------------------------------------------------------------------------------


def payloads(mark: Path) -> dict[str, Any]:
    line = f"open({str(mark)!r}, 'w')"
    touch = f"touch {mark}"
    return {
        "os.system": Call(os.system, touch),
        "exec": Call(exec, line),
        "eval": Call(eval, line),
        "subprocess": Call(subprocess.check_output, ["touch", str(mark)]),
        "partial": Call(functools.partial, os.system, touch),
        "getattr": Call(getattr, "", "upper"),
        "open": Call(open, str(mark), "w"),
        "import": Call(__import__, "os"),
        "apply": Call(map, os.system, [touch]),
        "torch": Call(torch.load, str(mark)),
        "torch.save": Call(torch.save, {}, str(mark)),
        "rename": Call(shutil.copy, __file__, str(mark)),
    }


NAMES = sorted(payloads(Path()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_checkpoints_are_read_without_running_what_they_name(
    tmp_path: Path, name: str, stage: int
) -> None:
    mark = tmp_path / "mark"
    good = stock(tmp_path / "good", stage)
    expected = Source(good).digest()
    assert Source(good, trust_pickle=True).digest() == expected
    for file in sorted(path.name for path in good.iterdir()):
        folder = Path(shutil.copytree(good, tmp_path / file / "folder"))
        content = torch.load(good / file, weights_only=False)
        torch.save(content | {"extra": [payloads(mark)[name]]}, folder / file)
        for command in (["inspect"], ["convert", "--out", str(tmp_path / "to")], ["verify"]):
            result = call("checkpoint", *command, folder)
            assert isinstance(result.exception, UserError) and not mark.exists(), command
        problem = str(call("checkpoint", "inspect", folder, "--digest").exception)
        assert "holds more than plain data" in problem and "--trust-pickle" in problem, problem
        assert isinstance(call("export", folder, "--out", tmp_path / "to").exception, UserError) and not mark.exists()
    if name == "os.system":
        assert call("checkpoint", "inspect", folder, "--digest", "--trust-pickle").exit_code == 0 and mark.exists()


def test_a_stage_is_read_as_python_3_11_0_to_3_writes_it(tmp_path: Path) -> None:
    [file] = (good := stock(tmp_path / "good")).glob("*optim_states.pt")
    expected, content = Source(good).digest(), torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["zero_stage"] = Call(getattr, ZeroStageEnum, "gradients")
    torch.save(content, file)
    assert Source(good).digest() == expected


@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), (3, 2), (0, 0)])
def test_with_a_manifest_nothing_is_unpickled_even_when_trusted(
    copied: Callable[[int, int], Path], tmp_path: Path, stage: int, ranks: int
) -> None:
    folder, mark = copied(stage, ranks), tmp_path / "mark"
    for path in sorted(folder.rglob("*.pt")):
        good = path.read_bytes()
        content = torch.load(path)
        touch = Call(os.system, f"touch {mark}")
        content = content | {"x": touch} if isinstance(content, dict) else touch
        refile(folder, path.relative_to(folder).as_posix(), content)
        if path.name == "optimizer_state.pt":  # which DeepSpeed alone reads
            continue
        with pytest.raises(UserError, match="more than plain data: it names posix.system") as caught:
            source = open_checkpoint(folder, trust_pickle=True)
            source.check()
            source.digest()
        assert "--trust-pickle" not in str(caught.value) and not mark.exists()
        refile(folder, path.relative_to(folder).as_posix(), good)


def test_a_stock_universal_layout_names_no_place_outside(tmp_path: Path) -> None:
    good = stock(tmp_path / "good")
    model = torch.load(good / "mp_rank_00_model_states.pt", weights_only=False)
    folder = tmp_path / "universal"
    (folder / "zero").mkdir(parents=True)
    model["param_shapes"] = [{"../../outside": torch.Size([1])}]
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    problem = refused(folder, tmp_path / "to")
    assert "cannot have a folder of its name" in problem and not (tmp_path / "outside").exists()


# ---- names and places -----------------------------------------------------------------------------------------------

OUTSIDE = ["../x", "../../x", "/tmp/x", "a/../../x", "", ".", "..", "a//b", "a\0b", "x" * 300, "\ud800"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_parameters_name_leads_nowhere(
    copied: Callable[[int, int], Path], tmp_path: Path, name: str, with_manifest: bool
) -> None:
    folder = copied(1, 1) if with_manifest else stock(tmp_path / "stock")
    file = "mp_rank_00_model_states.pt"
    model = torch.load(folder / file, weights_only=False)
    shapes = model["param_shapes"][0]
    renamed = {name if key == "a.weight" else key: shape for key, shape in shapes.items()}
    model["param_shapes"][0] = renamed
    if with_manifest:
        refile(folder, file, model)

        def change(body: dict[str, Any]) -> None:
            body["sharding"]["flat_tensors"][0]["parameters"][0]["name"] = name

        rewrite(folder, change)
    else:
        torch.save(model, folder / file)
    before = everything(tmp_path)
    with pytest.raises(UserError):
        universal.write(open_checkpoint(folder), tmp_path / "to" / "u")
    assert everything(tmp_path) == before


def everything(folder: Path) -> set[Path]:
    return set(folder.parent.rglob("*"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_files_name_leads_nowhere(copied: Callable[[int, int], Path], tmp_path: Path, name: str) -> None:
    folder = copied(1, 1)

    def change(body: dict[str, Any]) -> None:
        body["files"][name] = {"bytes": 1, "sha256": "0" * 64}

    rewrite(folder, change)
    assert "is damaged" in refused(folder, tmp_path / "to")


@pytest.mark.parametrize("named", ["../elsewhere", "/etc", "..", "", "a\0"])
def test_latest_names_a_folder_beside_it(tmp_path: Path, named: str) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "checkpoints" / "latest").write_text(named)
    with pytest.raises(UserError, match="not a file name"):
        find(tmp_path / "run")


def odd_files(folder: Path, outside: Path) -> dict[str, Callable[[Path], Any]]:
    def bind(path: Path) -> None:
        here = os.getcwd()
        os.chdir(folder)
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(here)

    return {
        "is a FIFO": os.mkfifo,
        "is a socket": bind,
        "is a folder": Path.mkdir,
        "is a link out of its folder": lambda path: path.symlink_to(outside),
        "link out": lambda path: path.symlink_to("/dev/zero"),
        "is missing": lambda path: path.symlink_to(folder / "nothing"),
        "cannot be read": lambda path: path.symlink_to(path.name),
    }


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", manifests.NAME])
def test_what_is_no_file_of_the_folder_is_not_read(
    copied: Callable[[int, int], Path], tmp_path: Path, name: str
) -> None:
    folder = copied(1, 1)
    outside = Path(shutil.copy(folder / name, tmp_path / "outside"))
    (folder / name).unlink()
    for expected, make in odd_files(folder, outside).items():
        make(folder / name)
        assert expected in refused(folder, tmp_path / "to"), expected
        assert "damaged" in str(call("checkpoint", "verify", folder).exception)
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()


def test_verify_names_what_is_extra_missing_or_unlisted(copied: Callable[[int, int], Path]) -> None:
    for stage, ranks in LAYOUTS[1:]:
        folder = copied(stage, ranks)
        for extra in ("more.pt", ".hidden", "aaa_zero_pp_rank_0_mp_rank_00_optim_states.pt", "sub/x"):
            (folder / extra).parent.mkdir(exist_ok=True)
            (folder / extra).touch()
            shown = call("checkpoint", "verify", folder)
            assert f"{extra.split('/')[0]}" in shown.output and "not listed" in shown.output, extra
            assert shown.exception is not None
            shutil.rmtree(folder / "sub") if "sub" in extra else (folder / extra).unlink()
        name = next(path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.pt")))
        (folder / name).rename(folder.parent / "kept")
        assert f"{name} is missing" in call("checkpoint", "verify", folder).output
        rewrite(folder, lambda body, name=name: body["files"].pop(name) and None)  # type: ignore[misc]
        shown = call("checkpoint", "verify", folder)
        assert shown.exception is not None and "intact" not in shown.output, shown.output
        (folder.parent / "kept").rename(folder / name)
        shown = call("checkpoint", "verify", folder)
        assert shown.exception is not None and "intact" not in shown.output, shown.output


def test_a_file_that_is_not_listed_is_not_read(copied: Callable[[int, int], Path], tmp_path: Path) -> None:
    folder = copied(1, 1)
    expected = Source(folder).digest()
    (folder / "aaa_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    assert Source(folder).digest() == expected
    (folder / "zero").mkdir()
    assert "lists no" in refused(folder, tmp_path)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def squeezed(folder: Path) -> Any:
    name = next(path.name for path in folder.glob("*optim*"))
    content = torch.load(folder / name)
    return name, content, content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]


def test_codes_grow_to_the_size_that_they_should_have_and_no_further(
    copied: Callable[[int, int], Path], tmp_path: Path, little_memory: None
) -> None:
    folder = copied(1, 1)
    name, content, state = squeezed(folder)
    key, there = next((key, value) for key, value in state.items() if key == "remainder")
    blocks = there["shape"][0]
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
    assert len(bomb) < 1 << 20
    forms = {
        "says its size": there | {"zstd": torch.frombuffer(bytearray(bomb), dtype=torch.uint8)},
        "and its shape": there
        | {"zstd": torch.frombuffer(bytearray(bomb), dtype=torch.uint8), "shape": [1 << 20, 256]},
        "huge shape": there | {"shape": [1 << 40, 256]},
        "negative": there | {"shape": [-1, 256]},
        "not numbers": there | {"shape": ["1", 256]},
        "other dtype": there | {"dtype": "float64"},
        "no dtype": there | {"dtype": "load"},
        "no frame": there | {"zstd": torch.zeros(9, dtype=torch.uint8)},
        "no tensor": there | {"zstd": b"1234"},
        "expanded": torch.zeros(1, 1, dtype=torch.int8).expand(blocks, 256),
        "other rows": torch.zeros(blocks + 1, 256, dtype=torch.int8),
        "other type": torch.zeros(blocks, 256, dtype=torch.int16),
        "nothing": None,
    }
    no_size = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(1 << 28))
    forms["no size"] = there | {"zstd": torch.frombuffer(bytearray(no_size), dtype=torch.uint8)}
    for what, value in forms.items():
        state[key] = value
        refile(folder, name, content)
        assert "damaged" in refused(folder, tmp_path / "to") or what == "expanded", what


def test_a_frame_that_lies_about_its_size_is_stopped(
    copied: Callable[[int, int], Path], tmp_path: Path, little_memory: None
) -> None:
    folder = copied(1, 1)
    name, content, state = squeezed(folder)
    there = state["remainder"]
    size = there["shape"][0] * 256
    small = zstandard.ZstdCompressor(level=1).compress(bytes(size))
    large = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
    # The right content size, before the blocks of a far larger one.
    lie = small[: zstandard.frame_header_size(small)] + large[zstandard.frame_header_size(large) :]
    assert zstandard.frame_content_size(lie) == size
    state["remainder"] = there | {"zstd": torch.frombuffer(bytearray(lie), dtype=torch.uint8)}
    refile(folder, name, content)
    assert "cannot be unpacked" in refused(folder, tmp_path / "to")


def test_records_that_are_compressed_are_not_unpacked(
    copied: Callable[[int, int], Path], tmp_path: Path, little_memory: None
) -> None:
    folder = copied(1, 1)
    path = folder / "mp_rank_00_model_states.pt"
    torch.save(torch.load(path) | {"text": "x" * (1 << 27)}, tmp_path / "large")
    with zipfile.ZipFile(tmp_path / "large") as old, zipfile.ZipFile(tmp_path / "bomb", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry), zipfile.ZIP_DEFLATED)
    refile(folder, path.name, (tmp_path / "bomb").read_bytes())
    assert path.stat().st_size < 1 << 20
    assert "compressed" in refused(folder, tmp_path / "to")


def test_a_pickle_that_holds_itself_or_grows_is_refused(copied: Callable[[int, int], Path], tmp_path: Path) -> None:
    folder = copied(1, 1)
    name = "mp_rank_00_model_states.pt"
    content = torch.load(folder / name)
    grows: list[Any] = [1]
    for _ in range(50):
        grows = [grows, grows]
    for value in (grows, content["lr_scheduler"]):
        content["lr_scheduler"]["x"] = value
        refile(folder, name, content)
        assert "nested too deeply or holds too much" in refused(folder, tmp_path / "to")


TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "shorter": lambda flat: flat[:-600].clone(),
    "longer": lambda flat: torch.cat([flat, flat]),
    "fp32": lambda flat: flat.float(),
    "2-D": lambda flat: flat.view(2, -1),
    "expanded": lambda flat: flat[:1].clone().expand(flat.numel()),
    "sparse": lambda flat: flat.to_sparse(),
    "meta": lambda flat: flat.to("meta"),
    "a list": lambda flat: flat.tolist(),
    "nothing": lambda flat: None,
}


@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_are_of_the_size_and_dtype_that_the_manifest_says(
    copied: Callable[[int, int], Path], tmp_path: Path, stage: int, what: str
) -> None:
    folder = copied(stage, 2)
    name = next(path.name for path in sorted(folder.glob("*optim*")))
    content = torch.load(folder / name)
    body = content["optimizer_state_dict"]
    flats = body["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
    flats[0] = TENSORS[what](flats[0])
    refile(folder, name, content)
    problem = refused(folder, tmp_path / "to")
    assert name in problem and ("damaged" in problem or "cannot be read" in problem), problem
