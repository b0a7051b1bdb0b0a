""" "auto" in `zero_optimization`: what becomes of it on which device, for which model and number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from toolkit.config import Shape, load_config, settle, shipped_configs, validate
from toolkit.errors import UserError
from toolkit.models import count_parameters
from toolkit.models import load_config as load_model
from toolkit.models.build import blueprint

KEYS = {
    "reduce_bucket_size": 4_194_304,
    "allgather_bucket_size": 4_194_304,
    "stage3_prefetch_bucket_size": 4_194_304,
    "stage3_max_live_parameters": 67_108_864,
    "stage3_max_reuse_distance": 67_108_864,
    "sub_group_size": 16_777_216,
}
"""On a CPU."""

BILLIONS = Shape(total=8_000_000_000, layer=218_112_256, largest=525_336_576)  # Llama 3 8B


def shape() -> Shape:
    return BILLIONS


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_file_on_a_cpu_has_the_same_small_sizes_whatever_the_model(name: str) -> None:
    config = load_config(name)
    settled = settle(config, shape, on_gpu=False, world_size=8)["zero_optimization"]
    stage = settled["stage"]
    assert settled["overlap_comm"] is (stage == 3)
    assert "auto" not in settled.values()
    for key in settled.keys() & KEYS.keys():
        assert settled[key] == KEYS[key]
    assert config["zero_optimization"]["reduce_bucket_size"] == "auto"  # a copy was settled


def test_on_gpus_a_layer_is_gathered_ahead_and_a_model_is_tens_of_buckets() -> None:
    settled = settle(load_config("amcs_zero3"), shape, on_gpu=True, world_size=8)["zero_optimization"]
    assert settled["stage3_prefetch_bucket_size"] == BILLIONS.layer
    needed = 2 * BILLIONS.layer + BILLIONS.largest
    assert settled["stage3_max_live_parameters"] == settled["stage3_max_reuse_distance"] == needed
    assert settled["reduce_bucket_size"] == 67_108_864
    small = Shape(total=134_107_392, layer=7_079_552, largest=24_576_000)
    settled = settle(load_config("amcs_zero2"), lambda: small, on_gpu=True, world_size=8)["zero_optimization"]
    assert settled["reduce_bucket_size"] == settled["allgather_bucket_size"] == 134_107_392 // 16


@pytest.mark.parametrize(("world_size", "overlaps"), [(1, False), (2, True)])
def test_one_gpu_has_nothing_to_overlap_below_stage_3(world_size: int, overlaps: bool) -> None:
    for stage in (1, 2):
        settled = settle(load_config(f"soam_zero{stage}"), shape, on_gpu=True, world_size=world_size)
        assert settled["zero_optimization"]["overlap_comm"] is overlaps
    settled = settle(load_config("soam_zero3"), shape, on_gpu=True, world_size=world_size)
    assert settled["zero_optimization"]["overlap_comm"] is True


def test_numbers_win_and_other_keys_stay_auto() -> None:
    zero = {"stage": 2, "reduce_bucket_size": 5, "overlap_comm": "auto", "contiguous_gradients": "auto"}
    config: dict[str, Any] = {"zero_optimization": zero, "gradient_clipping": "auto"}
    settled = settle(config, shape, on_gpu=True, world_size=2)
    assert settled == {"zero_optimization": zero | {"overlap_comm": True}, "gradient_clipping": "auto"}


@pytest.mark.parametrize("config", [{}, {"zero_optimization": True}, {"zero_optimization": {"stage": 3}}])
def test_the_model_is_not_looked_at_where_nothing_is_auto(config: dict[str, Any]) -> None:
    def unasked() -> Shape:
        raise AssertionError

    assert settle(config, unasked, on_gpu=True, world_size=2) == config


@pytest.mark.parametrize("name", ["qwen3-tiny", "qwen3-134m"])
def test_the_shape_of_a_preset_is_that_of_its_layers_and_matrices(name: str) -> None:
    found = Shape.of(blueprint(name, dtype=torch.bfloat16))
    config, _ = load_model(name)
    hidden, head = config.hidden_size, config.head_dim
    attention = 2 * hidden * head * (config.num_attention_heads + config.num_key_value_heads) + 2 * head
    assert found.layer == attention + 3 * hidden * config.intermediate_size + 2 * hidden
    assert found.largest == config.vocab_size * hidden
    assert found.total == count_parameters(config)


def test_without_layers_the_largest_parameter_counts_as_one() -> None:
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.Linear(20, 3))
    assert Shape.of(model) == Shape(total=263, layer=200, largest=200)


def test_a_config_is_complete_though_sizes_are_auto() -> None:
    config = load_config("amcs_zero3")
    del config["train_micro_batch_size_per_gpu"]
    validate(config, origin="my.json")
    with pytest.raises(UserError, match="both missing"):
        validate(config, origin="my.json", world_size=2)
