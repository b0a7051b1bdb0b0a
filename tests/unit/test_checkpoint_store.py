"""The folder of checkpoints, manifests, plain files, and where the parts of parameters lie."""

from __future__ import annotations

import enum
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.checkpoint import files, manifest
from toolkit.checkpoint.manifest import Manifest
from toolkit.checkpoint.store import Store, name_of
from toolkit.errors import UserError
from toolkit.state.layout import State
from toolkit.state.sharding import Flat, Fragment, Place, Sharding, reshard

EMPTY = Sharding(1, 1, None, (), ())


def save(store: Store, step: int, content: str = "x") -> None:
    draft = store.draft(step)
    folder = draft / name_of(step)
    folder.mkdir(parents=True)
    entry = files.save({"content": content}, folder / "file.pt")
    store.commit(draft, Manifest(step, EMPTY, {}, {"file.pt": entry}))


def test_retention_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_last=2, keep_every=30)
    for step in range(10, 101, 10):
        save(store, step)
        assert (tmp_path / "latest").read_text() == name_of(step)
    assert store.steps() == [100, 90, 60, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*map(name_of, store.steps()), "latest"])


def test_a_damaged_newer_checkpoint_costs_no_good_one(tmp_path: Path) -> None:
    """A run that resumed from step 2, because 3 is damaged, must not count 3 among those that it keeps."""
    store = Store(tmp_path, keep_last=1)
    save(store, 3)
    save(Store(tmp_path, keep_last=2), 2)
    (store.path(3) / "file.pt").unlink()
    save(store, 2)
    assert manifest.damage(store.path(2), manifest.read(store.path(2))) is None
    save(store, 3, "anew")
    assert torch.load(store.path(3) / "file.pt") == {"content": "anew"}
    assert store.steps() == [3]


def test_a_commit_without_all_files_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 1)
    draft = store.draft(2)
    (draft / name_of(2)).mkdir(parents=True)
    with pytest.raises(OSError, match="file.pt is missing; all machines must share"):
        store.commit(draft, Manifest(2, EMPTY, {}, {"file.pt": {"bytes": 1, "sha256": ""}}))
    assert store.steps() == [1] and (tmp_path / "latest").read_text() == name_of(1)
    store.tidy()
    assert not draft.exists()


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_every_damage_is_seen(tmp_path: Path, at: float) -> None:
    store = Store(tmp_path)
    save(store, 1)
    folder = store.path(1)
    for name in ("file.pt", manifest.NAME):
        good = (folder / name).read_bytes()
        for bad in (good[: int(len(good) * at)], good[:-1] + bytes([good[-1] ^ 4]), b""):
            (folder / name).write_bytes(bad)
            try:
                problem = manifest.damage(folder, manifest.read(folder))
            except UserError as error:
                problem = str(error)
            assert problem is not None and name in problem
        place = int(len(good) * at)
        (folder / name).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises((UserError, AssertionError)):
            assert manifest.damage(folder, manifest.read(folder)) is None
        (folder / name).write_bytes(good)
    assert manifest.damage(folder, manifest.read(folder)) is None


def test_a_newer_format_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_WHOLE", 4)
    with pytest.raises(OSError, match="of format 4"):  # what could not be read is not put in place
        save(Store(tmp_path), 1)
    [draft] = tmp_path.glob(f".saving-*/{name_of(1)}")
    with pytest.raises(UserError, match=r"format 4, which a newer .* up to 3: update it \(pip install --upgrade"):
        manifest.read(draft)


def test_only_a_checkpoint_without_its_base_is_of_the_format_that_older_versions_refuse(tmp_path: Path) -> None:
    for base, number in ((None, 2), ({"path": "/models/base", "sha256": "a" * 64}, 3)):
        model = {"name": "base", "sha256": "b" * 64} | ({"base": base} if base else {})
        data = {"name": "d", "sha256": "c", "part": "all", "seq_len": 8, "seed": 0, "windows": [4, 4]}
        facts = {"identity": {"model": model, "tokenizer": {"name": "t", "sha256": "d"}, "data": data}}
        manifest.write(tmp_path, Manifest(1, EMPTY, facts))
        assert json.loads((tmp_path / manifest.NAME).read_text())["format"] == number
        assert manifest.read(tmp_path).facts == facts


class Colour(enum.Enum):
    RED = 3


class Scaler:
    def __init__(self) -> None:
        self.scale, self.window = 2.0, (1, None)


def test_files_need_no_class_of_anybodys(tmp_path: Path) -> None:
    content = {
        "stage": Colour.RED,
        "scaler": Scaler(),
        "shape": torch.Size([2, 3]),
        "ordered": OrderedDict(a=[np.float64(1.5), {1, 2}]),
        "tensor": torch.arange(10)[2:4],
        Colour.RED: None,
    }
    files.save(files.plain(content, files.on_host), tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)
    assert loaded["stage"] == 3 and loaded["scaler"] == {"scale": 2.0, "window": (1, None)}
    assert loaded["shape"] == (2, 3) and loaded["ordered"] == OrderedDict(a=[1.5, (1, 2)]) and loaded[3] is None
    assert loaded["tensor"].tolist() == [2, 3] and loaded["tensor"].untyped_storage().nbytes() == 16


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.int64]),
    piece=st.sampled_from([8, 24, 64, 4096]),
)
def test_staged_copies_are_copies(shapes: list[list[int]], dtype: torch.dtype, piece: int) -> None:
    staging = files.Staging(piece, pin=False)
    tensors = [torch.randint(0, 2, shape).to(dtype) for shape in shapes]
    tensors += [tensor.transpose(0, 1) for tensor in tensors if tensor.dim() > 1]
    made = [staging.copy(tensor) for tensor in tensors]
    staging.finish()
    for tensor, copy in zip(tensors, made, strict=True):
        assert copy.dtype == dtype and torch.equal(copy, tensor)
        assert copy.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert not tensor.numel() or copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_are_squeezed_without_loss(dtype: torch.dtype) -> None:
    few = (torch.randn(64, 256) * 8).to(torch.int8).view(dtype)
    noise = torch.randint(0, 256, (64, 256), dtype=torch.uint8).view(dtype)
    squeezed = files.squeeze(few)
    assert squeezed["zstd"].numel() < few.numel() and torch.equal(files.unsqueezed(squeezed), few)
    assert files.squeeze(noise) is noise and files.unsqueezed(noise) is noise


shapes = st.lists(st.sampled_from([(3,), (700,), (16, 16), (256, 3)]), min_size=1, max_size=4)
alone = st.sampled_from([[(5, 7)], [(300, 3)], [(17, 1000)]])


@given(
    groups=st.lists(shapes | alone, min_size=1, max_size=3), stage=st.sampled_from([1, 2, 3]), ranks=st.integers(1, 5)
)
def test_every_element_lies_in_one_place(groups: list[list[tuple[int, ...]]], stage: int, ranks: int) -> None:
    """Fragments make up each parameter once; blocks of a matrix are its own, and begin where it does."""
    groups = [kind for group in groups for kind in ([s for s in group if len(s) > 1], [s for s in group if len(s) < 2])]
    flats = tuple(
        Flat(
            g, "other", 0, "float32", "fp32", {}, tuple(Place(f"{g}.{i}", shape, 0) for i, shape in enumerate(members))
        )
        for g, members in enumerate(groups)
        if members
    )
    cut = reshard(Sharding(1, 1, None, (State("m"),), flats), stage=stage, world_size=ranks)
    assert Sharding.from_json(json.loads(json.dumps(cut.to_json()))).flats == cut.flats
    for index, flat in enumerate(cut.flats):
        taken = [torch.zeros(flat.size, dtype=torch.int64) for _ in range(ranks)]
        owners = [[""] * -(-flat.size // 256) for _ in range(ranks)]
        found: dict[str, list[Fragment]] = {place.name: [] for place in flat.places}
        for rank in range(ranks):
            for place, fragment in cut.on_rank(index, rank):
                found[place.name].append(fragment)
                taken[rank][fragment.elements] += 1
                if len(place.shape) > 1:
                    assert fragment.start % 256 == fragment.offset % 256 == 0
                    assert set(owners[rank][fragment.blocks]) == {""}
                    owners[rank][fragment.blocks] = [place.name] * len(owners[rank][fragment.blocks])
        assert max(int(part.max()) for part in taken) == 1
        for place in flat.places:
            assert found[place.name] == cut.fragments(index, place), "by rank and by parameter they are the same"
            elements = [e for fragment in found[place.name] for e in range(fragment.start, fragment.stop)]
            assert elements == list(range(place.numel))
            middle = cut.fragments(index, place, place.numel // 3, place.numel // 2)
            assert sum(fragment.numel for fragment in middle) == place.numel // 2 - place.numel // 3
