"""`DeepSpeedSettings` against what DeepSpeed itself reads from the same JSON."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from toolkit.config import DeepSpeedSettings, load_config, shipped_configs
from toolkit.config.batch import ACCUMULATION, GLOBAL, MICRO
from toolkit.config.deepspeed import current
from toolkit.config.files import without_auto

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "train_micro_batch_size_per_gpu": 2}
SIZES = {"reduce_bucket_size": 7, "stage3_prefetch_bucket_size": 8, "stage3_max_live_parameters": 9}
SIZES |= {"stage3_max_reuse_distance": 10, "stage3_param_persistence_threshold": 11, "sub_group_size": 12}

CASES: dict[str, dict[str, Any]] = {
    **{name: without_auto(load_config(name)) for name in shipped_configs()},
    "nothing": ADAM,
    "stage 1, as it was written once": ADAM | {"zero_optimization": True},
    "stage 0, as it was written once": ADAM | {"zero_optimization": False},
    "bfloat16": ADAM | {"bfloat16": {"enabled": True}},
    "bf16 before bfloat16": ADAM | {"bfloat16": {"enabled": True}, "bf16": {"enabled": False}},
    "fp16": ADAM | {"fp16": {"enabled": True}, "bf16": {"enabled": False}},
    "a flag of 1": ADAM | {"bf16": {"enabled": 1}},
    "sizes": ADAM | {"zero_optimization": {"stage": 3, "overlap_comm": False, **SIZES}},
    "overlap left open": ADAM | {"zero_optimization": {"stage": 3, "overlap_comm": None}},
    "offload, as it was written once": ADAM
    | {"zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}},
    "no offload": ADAM | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
    "offload to nvme": ADAM
    | {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
    "scheduler": ADAM | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}},
    "gradients in fp32": ADAM | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "float32"}},
}


def device(section: Any) -> str:
    return "none" if section is None else str(getattr(section.device, "value", section.device))


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_what_deepspeed_reads(name: str) -> None:
    config = CASES[name]
    theirs = DeepSpeedConfig({**copy.deepcopy(config), "train_micro_batch_size_per_gpu": 2})
    for ours in (DeepSpeedSettings.read(config), DeepSpeedSettings.read(current(config))):
        zero, buckets = theirs.zero_config, ours.buckets
        assert ours.stage == zero.stage
        dtypes = {torch.bfloat16: theirs.bfloat16_config.enabled, torch.float16: theirs.float16_config.enabled}
        assert ours.dtype == next((dtype for dtype, on in dtypes.items() if on), torch.float32)
        offloads = device(zero.offload_optimizer), device(zero.offload_param)
        assert (ours.offload_optimizer, ours.offload_param) == offloads
        assert (buckets.reduce, buckets.sub_group) == (zero.reduce_bucket_size, zero.sub_group_size)
        assert (buckets.prefetch, buckets.live) == (zero.prefetch_bucket_size, zero.max_live_parameters)
        assert (buckets.reuse, buckets.persistent) == (zero.max_reuse_distance, zero.param_persistence_threshold)
        assert buckets.overlap is zero.overlap_comm
        assert (ours.optimizer or "").lower() == theirs.optimizer_name.lower()
        assert (ours.scheduler, dict(ours.scheduler_params)) == (theirs.scheduler_name, theirs.scheduler_params or {})
        assert ours.gradients == {None: None, "float32": "fp32"}[theirs.grad_accum_dtype]


def test_auto_counts_as_left_out() -> None:
    ds = DeepSpeedSettings.read(
        {
            "optimizer": {"type": "AMCS", "params": {"lr": "auto", "weights": "auto"}},
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"},
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": "auto",
        }
    )
    assert (ds.stage, ds.computed, ds.params, ds.weights, ds.state_format) == (0, "fp32", {}, "fp32", "8bit")
    assert ds.buckets == DeepSpeedSettings().buckets and ds.batch == {GLOBAL: 8}


def test_what_a_rule_keeps() -> None:
    def read(kind: str, stage: int, **params: Any) -> DeepSpeedSettings:
        config = {"optimizer": {"type": kind, "params": params}, "bf16": {"enabled": True}}
        return DeepSpeedSettings.read(config | {"zero_optimization": {"stage": stage}})

    lean = read("amcs", 2)
    assert lean.rule is not None and lean.rule.__name__ == "AMCS" and not lean.foreign
    assert (lean.weights, lean.without_masters, lean.releases_gradients) == ("bf16+8", True, False)
    assert not read("AMCS", 0).without_masters and not read("AMCS", 2, weights="fp32").without_masters
    assert read("AMCS", 2, release_gradients=True).releases_gradients
    plain = read("AdamW", 2)
    assert (plain.rule, plain.foreign, plain.weights, plain.state_format) == (None, "adamw", "fp32", "fp32")
    assert DeepSpeedSettings.read(ADAM | {"gradient_accumulation_steps": 3}).batch == {MICRO: 2, ACCUMULATION: 3}
