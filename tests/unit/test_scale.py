"""Large jobs that nobody starts here: how 64 to 1,024 ranks would cut Llama-3-shaped models, and their checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.manifest import Manifest
from toolkit.checkpoint.schema import disagreement
from toolkit.checkpoint.source import OPTIMIZER_FILE, Source, model_file
from toolkit.models.build import blueprint
from toolkit.optim import AMCS, param_groups
from toolkit.optim.rule import all_states
from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import Flat, Fragment, Place, Sharding, reshard

RANKS = (64, 512, 1024)
INDEXABLE = 2**31
"""Elements that 32-bit indices of kernels reach."""


def of_one_rank(model: nn.Module) -> Sharding:
    """All parameter groups of `model` on one rank, with AMCS's 8-bit state and bf16+8 weights."""
    optimizer = AMCS(param_groups(model), total_steps=1)
    names = {id(param): name for name, param in model.named_parameters()}
    flats = []
    for number, group in enumerate(optimizer.param_groups):
        at, places = 0, []
        for param in group["params"]:
            places.append(Place(names[id(param)], tuple(param.shape), at))
            at += param.numel()
        formats = dict(group["state_format"])
        flats.append(Flat(number, group["component"], at, "bfloat16", group["weights"], formats, tuple(places)))
    return Sharding(2, 1, "AMCS", all_states(optimizer.rules()), tuple(flats))


@cache
def preset(name: str) -> Sharding:
    return of_one_rank(blueprint(name, dtype=torch.bfloat16))


def numel(sharding: Sharding) -> int:
    return sum(place.numel for flat in sharding.flats for place in flat.places)


def check_cut(sharding: Sharding) -> None:
    """Every element has one place, blocks are whole, no rank is left out, and nothing is too large to be indexed."""
    assert disagreement(sharding) is None and sharding.straddling() is None
    share = sum(flat.size for flat in sharding.flats)
    total, ranks = numel(sharding), sharding.world_size
    assert total <= share * ranks < 1.01 * total, "padding"
    assert max(flat.size for flat in sharding.flats) < INDEXABLE
    for flat in sharding.flats:
        for place in flat.places:
            assert place.numel < INDEXABLE, "gradients go through the kernel one by one"
    for rank in (0, 1, ranks // 2, ranks - 2, ranks - 1):
        held = [fragment.numel for index in range(len(sharding.flats)) for _, fragment in sharding.on_rank(index, rank)]
        assert sum(held) > 0.9 * total / ranks
    for index, flat in enumerate(sharding.flats):
        if sharding.stage < 3:  # parts are of one size: as many ranks as that allows have some
            filled = -(-sum(place.numel for place in flat.places) // flat.size)
            assert sharding.on_rank(index, filled - 1)
            assert filled == ranks or not sharding.on_rank(index, filled)
            assert flat.size - sum(place.numel for place in flat.places) / ranks <= BLOCK


def plan(source: Sharding, target: Sharding) -> Iterator[tuple[int, Fragment, list[Fragment]]]:
    """For each rank of `target`, what it holds and from which ranks' files that comes."""
    for rank in range(target.world_size):
        for index in range(len(target.flats)):
            for place, fragment in target.on_rank(index, rank):
                old, there = source.by_name[place.name]
                yield rank, fragment, source.fragments(old, there, fragment.start, fragment.stop)


def check_reshard(source: Sharding, target: Sharding) -> None:
    arrived, largest = 0, 0
    readers: dict[int, set[int]] = {}
    for rank, fragment, pieces in plan(source, target):
        assert [piece.start for piece in pieces] == [fragment.start, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == fragment.stop
        arrived += fragment.numel
        largest = max(largest, fragment.numel)
        for piece in pieces:
            readers.setdefault(piece.rank, set()).add(rank)
    assert arrived == numel(source)
    assert sorted(readers) == list(range(source.world_size)), "of every file something is read"
    assert largest < INDEXABLE


def save(folder: Path, sharding: Sharding) -> None:
    """A checkpoint of which only the manifest has content."""
    names = [OPTIMIZER_FILE.format(rank=rank) for rank in range(sharding.world_size)]
    names += sorted({model_file(sharding.stage, rank) for rank in range(sharding.world_size)})
    for name in names:
        (folder / name).touch()
    entry = {"bytes": 8 * numel(sharding) // len(names), "sha256": "0" * 64}
    manifests.write(folder, Manifest(7, sharding, {}, dict.fromkeys(names, entry)))


def check_job(name: str, stage: int, ranks: int, folder: Path) -> None:
    sharding = reshard(preset(name), stage=stage, world_size=ranks)
    check_cut(sharding)
    save(folder, sharding)
    began = time.process_time()
    opened = Source(folder)
    assert time.process_time() - began < 5.0
    assert opened.sharding == sharding
    assert opened.manifest.parameters == numel(preset(name))
    if ranks == max(RANKS):
        check_reshard(opened.sharding, reshard(opened.sharding, stage=stage, world_size=64))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_job_of_8b(ranks: int, stage: int, tmp_path: Path) -> None:
    check_job("llama3-8b", stage, ranks, tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_mixture_of_experts(stage: int, tmp_path: Path) -> None:
    check_job("qwen3-30b-a3b", stage, 512, tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_job_of_70b(ranks: int, stage: int, tmp_path: Path) -> None:
    check_job("llama3-70b", stage, ranks, tmp_path)


def test_a_rank_without_anything_is_found() -> None:
    cut = reshard(preset("llama3-8b"), stage=2, world_size=64)
    less = [Flat(**{**vars(flat), "size": flat.size * 2}) for flat in cut.flats]
    with pytest.raises(AssertionError):
        check_cut(Sharding(2, 64, cut.rule, cut.states, tuple(less)))


ENGINE = """
import json, os, sys
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

rank, size = int(sys.argv[1]), int(sys.argv[2])
os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
from test_scale import engines_model
from engines import BASE
import toolkit
from toolkit.zero.checkpoint import sharding

found = {}
for stage in (1, 2, 3):
    own = {"type": "AMCS", "params": {"lr": 1e-3, "total_steps": 1, "compile": False}}
    batch = {"train_batch_size": size, "train_micro_batch_size_per_gpu": 1}
    config = BASE | batch | {"optimizer": own, "zero_optimization": {"stage": stage}}
    found[stage] = sharding(toolkit.initialize(model=engines_model(), config=config)[0]).to_json()
print("FOUND" + json.dumps(found))
"""


def engines_model() -> nn.Module:
    """With matrices of more and of fewer blocks than there are ranks, and tensors of one dimension."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(1500, 200), nn.Linear(200, 300), nn.LayerNorm(300), nn.Linear(300, 40))


def test_engines_of_1024_ranks_cut_as_planned() -> None:
    """DeepSpeed's own layout, with a process group that sends nothing."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *sys.path])
    command = [sys.executable, "-c", ENGINE, "1023", "1024"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.split("FOUND")[1])
    whole = of_one_rank(engines_model().bfloat16())
    for stage, made in found.items():
        assert Sharding.from_json(made) == reshard(whole, stage=int(stage), world_size=1024)
