"""Names of the hub: what `toolkit export --push` uploads and to whom it is shown, and models in the hub's cache."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, hub
from small_models import qwen3

from toolkit.checkpoint.hub import Push
from toolkit.errors import UserError
from toolkit.models import build_model, load_config
from toolkit.models.lora import peft_config
from toolkit.models.presets import folder_of
from toolkit.records.lora import LoRA


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


def test_a_name_of_the_hub_is_what_its_cache_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of `hf download`: files are links out of the folder of a revision, which `refs/main` names."""
    source, place = Path(qwen3(tmp_path / "source")), tmp_path / "hub" / "models--Qwen--Qwen3-0.6B"
    wanted = build_model(str(source), dtype=torch.bfloat16, seed=5).hf
    wanted.save_pretrained(source)
    for revision in ("older", "newer"):
        (place / "snapshots" / revision).mkdir(parents=True)
    (place / "blobs").mkdir()
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("newer")
    for number, file in enumerate(source.iterdir()):
        file.rename(place / "blobs" / str(number))
        (place / "snapshots" / "newer" / file.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config, preset = load_config("Qwen/Qwen3-0.6B")
    assert preset is None and config.hidden_size == 32
    found = build_model("Qwen/Qwen3-0.6B", dtype=torch.bfloat16, seed=6, from_checkpoint=True).hf
    for name, param in found.named_parameters():
        assert torch.equal(param, wanted.get_parameter(name))
    assert folder_of("Qwen/Qwen3-0.6B") == place / "snapshots" / "newer"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    with pytest.raises(UserError, match="model folder 'Qwen/Qwen3-0.6B' holds no config.json"):
        load_config("Qwen/Qwen3-0.6B")  # a folder that is here is what is meant


def test_adapters_name_a_model_of_the_hub_as_other_machines_know_it(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    cached, own = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "a1b2", tmp_path / "own"
    for folder in (cached, own):
        folder.mkdir(parents=True)
    names = [peft_config(LoRA(), str(folder)) for folder in (cached, own)]
    assert [(name.base_model_name_or_path, name.revision) for name in names] == [
        ("Qwen/Qwen3-0.6B", "a1b2"),
        (str(own.resolve()), None),
    ]
