"""Weights are built where the optimizer has them: what an engine takes while it is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import qwen3
from torch import nn
from torch.profiler import ProfilerActivity, profile

import toolkit
from toolkit.config import DeepSpeedSettings
from toolkit.errors import UserError
from toolkit.memory.trace import allocations
from toolkit.models import build_model
from toolkit.models.build import blocks
from toolkit.optim import param_groups
from toolkit.state.codecs import BLOCK
from toolkit.zero.places import Places, laid_out, places
from toolkit.zero.shards import model_weights, shards
from toolkit.zero.stage3 import ShardedZeroOptimizer3

pytestmark = pytest.mark.usefixtures("one_rank")

WIDE = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 6}


def config(stage: int, weights: str = "bf16") -> dict[str, Any]:
    params = {"lr": 1e-3, "state_format": "lean", "weights": weights, "compile": False, "release_gradients": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AMCS", "params": params},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1024},
    }


@contextmanager
def counted() -> Iterator[list[int]]:
    """Sizes of allocations, negative where they are freed, in order; there when the block has ended."""
    sizes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield sizes
    events = sorted(allocations(seen), key=lambda event: event.start_time_ns)
    sizes += [event.extra_fields.alloc_size for event in events]


def made(folder: str, stage: int) -> Any:
    """An engine, as a run makes it."""
    given = config(stage)
    toolkit.register()
    place, zero3 = places(DeepSpeedSettings.read(given)), given if stage == 3 else None
    model = build_model(folder, dtype=torch.bfloat16, seed=1, zero3_config=zero3, place=place)
    return toolkit.initialize(model=model, config=given, total_steps=4)[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_an_engine_takes_no_more_than_it_keeps_and_a_layer(stage: int, tmp_path: Path) -> None:
    folder = qwen3(tmp_path, **WIDE)
    with counted() as sizes:
        engine = made(folder, stage)
    held, peak = sum(sizes), max(accumulate(sizes))
    weights = sum(p.nbytes for p in engine.module.parameters())
    layer = max(sum(p.numel() for p in block.parameters()) for _, block in blocks(engine.module.hf))
    # Drawn in fp32; the group of the MLPs alone is several times as large.
    assert weights <= held <= weights * 1.02
    assert peak <= held + 4 * layer
    assert max(shard.tensor.nbytes for shard in engine.optimizer._shards) > 2 * 4 * layer
    for shard in engine.optimizer._shards:
        assert shard.tensor.data_ptr() == model_weights(engine.optimizer, shard).data_ptr()
    expected = dict(build_model(folder, dtype=torch.bfloat16, seed=1).named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in engine.module.named_parameters())


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_weights_on_the_host_are_not_cloned_on_the_way_to_master_weights(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, peaks = ShardedZeroOptimizer3._create_fp32_partitions, list[int]()

    def watched(self: Any) -> None:
        with counted() as sizes:
            create(self)
        peaks.append(max(accumulate(sizes), default=0))

    monkeypatch.setattr(ShardedZeroOptimizer3, "_create_fp32_partitions", watched)
    given = config(3, weights)
    given["optimizer"]["params"] |= {"state_format": "8bit", "release_gradients": False}
    given["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    given["zero_force_ds_cpu_optimizer"] = False
    toolkit.register()
    built = build_model(qwen3(tmp_path, **WIDE), dtype=torch.bfloat16, seed=1, zero3_config=given)
    engine = toolkit.initialize(model=built, config=given, total_steps=4)[0]
    model = sum(param.ds_numel for param in engine.module.parameters())
    assert peaks[0] < 4.05 * model if weights == "fp32" else peaks[0] < 0.01 * model
    engine.destroy()


def test_at_stage_3_weights_are_no_copies_of_themselves(tmp_path: Path) -> None:
    with counted() as sizes:
        engine = made(qwen3(tmp_path, **WIDE), 3)
    found = shards(engine.optimizer)
    assert max(shard.tensor.nbytes for shard in found) not in sizes
    for shard in found:
        own = model_weights(engine.optimizer, shard)
        assert own.data_ptr() == shard.tensor.data_ptr() and own is not shard.tensor
        assert shard.tensor.requires_grad and not own.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp32_master_weights_are_copies(dtype: torch.dtype, tmp_path: Path) -> None:
    given = config(2, "fp32") | {"bf16": {"enabled": dtype == torch.bfloat16}}
    given["optimizer"]["params"]["release_gradients"] = False
    model = build_model(qwen3(tmp_path), dtype=dtype, seed=1)
    engine = toolkit.initialize(model=model, config=given, total_steps=4)[0]
    for shard in engine.optimizer._shards:
        own = model_weights(engine.optimizer, shard)
        assert shard.tensor.dtype == torch.float32 and shard.tensor.data_ptr() != own.data_ptr()
        assert type(shard.tensor) is type(own) is torch.Tensor and torch.equal(shard.tensor, own.float())


def test_places_are_parts_of_one_tensor_for_each_group_in_whole_blocks(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10, 30), nn.LayerNorm(30), nn.Linear(30, 7))
    frozen = model[2].weight.requires_grad_(False)
    room = Places(model)
    parts = {name: room(param) for name, param in reversed(list(model.named_parameters()))}
    assert {name: part.shape for name, part in parts.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert parts["2.weight"].untyped_storage().nbytes() == 4 * frozen.numel()
    for group in param_groups(model):
        names = [name for name, p in model.named_parameters() if any(p is one for one in group["params"])]
        for number, name in enumerate(names):
            parts[name].fill_(number)
        flat = laid_out([parts[name] for name in names], ranks=1)
        assert flat.data_ptr() == parts[names[0]].data_ptr() and flat.numel() % BLOCK == 0
        numels = [parts[name].numel() for name in names]
        expected = [float(i) for i, numel in enumerate(numels) for _ in range(numel)]
        assert flat.tolist() == expected + [0.0] * (flat.numel() - len(expected))


@pytest.mark.parametrize("how", ["apart", "turned", "gap", "more ranks", "another's", "transposed"])
def test_what_is_laid_out_otherwise_is_moved_one_by_one(how: str) -> None:
    memory = torch.arange(float(BLOCK))
    memory[36:] = 0
    pieces = [memory[:12].view(3, 4), memory[12:36].view(6, 4)]
    if how == "apart":
        pieces = [piece.clone() for piece in pieces]
    if how == "turned":
        pieces = pieces[::-1]
    if how == "gap":
        pieces[1] = memory[16:36].view(5, 4)
    if how == "another's":
        memory[-1] = 7
    if how == "transposed":
        pieces[1] = pieces[1].t()
    values = [piece.clone() for piece in pieces]
    params = [nn.Parameter(piece) for piece in pieces]
    flat = laid_out(params, ranks=2 if how == "more ranks" else 1)
    assert flat.data_ptr() != memory.data_ptr() and not flat.requires_grad
    assert torch.equal(flat[: sum(v.numel() for v in values)], torch.cat([v.reshape(-1) for v in values]))
    assert not flat[sum(v.numel() for v in values) :].any()
    storage = flat.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in params)
    assert all(torch.equal(p, value) for p, value in zip(params, values, strict=True))


def test_memory_of_several_processes_is_not_stepped_in_place() -> None:
    shared = nn.Parameter(torch.ones(BLOCK).share_memory_())
    assert not laid_out([shared], ranks=1).is_shared()


def test_where_there_is_no_room_for_another_group_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "available_memory", lambda *_: 0)
    folder = qwen3(tmp_path, **WIDE)
    with counted() as sizes:
        engine = made(folder, 2)
    largest = max(shard.tensor.nbytes for shard in engine.optimizer._shards)
    assert sum(size == largest for size in sizes) == 1, "where its weights were drawn"
    expected = dict(build_model(folder, dtype=torch.bfloat16, seed=1).named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in engine.module.named_parameters())


@pytest.mark.parametrize("offload", [False, True])
def test_groups_of_two_dtypes_are_their_own_weights(offload: bool) -> None:
    """Norms in fp32 beside bf16 matrices, and no section of the JSON that makes them one."""
    model = nn.Sequential(nn.Linear(16, 64, bias=False).bfloat16(), nn.LayerNorm(64))
    given = config(2) | {"bf16": {"enabled": False}}
    given["optimizer"]["params"] |= {"release_gradients": False}
    del given["optimizer"]["params"]["weights"]
    if offload:
        given["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        with pytest.raises(
            UserError, match="a parameter group is float32 and others are bfloat16: with offload_optimizer"
        ):
            toolkit.initialize(model=model, config=given, total_steps=4)
        return
    engine = toolkit.initialize(model=model, config=given, total_steps=4)[0]
    for shard in engine.optimizer._shards:
        own = model_weights(engine.optimizer, shard)
        assert shard.tensor.data_ptr() == own.data_ptr() and shard.tensor.dtype == own.dtype
    assert {shard.tensor.dtype for shard in engine.optimizer._shards} == {torch.bfloat16, torch.float32}
