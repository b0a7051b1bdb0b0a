"""`toolkit export --push`: what is uploaded, to whom it is shown, and what is said where it cannot be."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, hub

from toolkit.checkpoint.hub import Push
from toolkit.errors import UserError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub(monkeypatch) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "exported"


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)


@pytest.mark.parametrize("public", [False, True])
def test_a_folder_gets_to_a_new_repository_private_unless_asked(server: Hub, folder: Path, public: bool) -> None:
    push = Push.checked("owner/name", folder, public=public)
    assert server.private == {}, "nothing is made before there is a folder"
    write(folder)
    assert push.upload(folder, "Step 5") == f"{server.url}/owner/name"
    assert server.private == {"owner/name": not public}
    assert server.files["owner/name"] == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nothing_is_uploaded_for_everybody_by_mistake(server: Hub, folder: Path) -> None:
    server.private |= {"owner/name": False, "owner/mine": True}
    with pytest.raises(UserError, match="--push owner/name: the repository is there and public; give --public"):
        Push.checked("owner/name", folder, public=False)
    Push.checked("owner/name", folder, public=True)
    Push.checked("owner/mine", folder, public=False)
    with pytest.raises(UserError, match="--push owner/mine: the repository is there and private, which --public does"):
        Push.checked("owner/mine", folder, public=True)
    write(folder)
    with pytest.raises(
        UserError, match=r"all of .*exported would be uploaded, and it is not empty; give another --out\.$"
    ):
        Push.checked("owner/mine", folder, public=False)


def test_a_model_takes_the_place_of_the_one_that_was_there(server: Hub, folder: Path, tmp_path: Path) -> None:
    push = Push.checked("owner/name", folder, public=False)
    write(folder)
    (folder / "adapter_config.json").write_text("{}")
    push.upload(folder, "Step 5")
    server.files["owner/name"] |= {"README.md": b"mine", "plots/model.png": b"mine"}
    later = tmp_path / "later"
    later.mkdir()
    new = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name in (*new, "model.safetensors.index.json"):
        (later / name).write_text("new")
    Push.checked("owner/name", tmp_path / "none", public=False).upload(later, "Step 6")
    kept = {"README.md": b"mine", "plots/model.png": b"mine"}
    assert server.files["owner/name"] == kept | {path.name: b"new" for path in later.iterdir()}


@pytest.mark.parametrize(
    ("name", "words"),
    [("name", "say whose it is, as in --push owner/name."), ("a b/c", "Repo id must"), ("a/b/c", "Repo id must")],
)
def test_a_wrong_name_is_a_sentence(server: Hub, folder: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        Push.checked(name, folder, public=False)
    assert "\n" not in str(told.value)


def test_what_is_in_the_way_is_said_before_anything_is_written(
    server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.role = "read"
    with pytest.raises(UserError, match="--push owner/name: the token may only read; make one that may write"):
        Push.checked("owner/name", folder, public=False)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="--push owner/name: the hub refuses the token: .*HF_TOKEN"):
        Push.checked("owner/name", folder, public=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="--push owner/name needs a token of the hub: `hf auth login`, or set HF_TOKEN"):
        Push.checked("owner/name", folder, public=False)
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(UserError, match="--push owner/name: the hub cannot be reached: "):
            Push.checked("owner/name", folder, public=False)
    assert not folder.exists()


def test_an_upload_that_fails_leaves_the_folder_and_says_how_to_go_on(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    push = Push.checked("owner/name", folder, public=False)
    write(folder)
    server.full = True
    with pytest.raises(UserError, match="is written, and its upload failed: .*storage limit") as told:
        push.upload(folder, "Step 5")
    assert f"try it again with `hf upload owner/name '{folder}' --private --delete 'model.safetensors*'" in str(
        told.value
    )
    assert "\n" not in str(told.value) and len(list(folder.iterdir())) == 2
