"""Validation: the sentence for every mistake, what must pass, and agreement with DeepSpeed's own config reader."""

from __future__ import annotations

import copy
from collections.abc import KeysView, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from refusals import changed, refusal

from toolkit.config import load_config, validate
from toolkit.config.schema import DeepSpeedJson, deepspeed_models

TOP_LEVEL = sorted(get_type_hints(DeepSpeedJson))


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        # unknown keys, at every depth
        ("gradient_cliping=1.0", "unknown key 'gradient_cliping'. Did you mean 'gradient_clipping'?"),
        ("zero_optimisation.stage=2", "unknown key 'zero_optimisation'. Did you mean 'zero_optimization'?"),
        ("zero_optimization.stge=2", "unknown key 'zero_optimization.stge'. Did you mean 'stage'?"),
        (
            "zero_optimization.offload_optimizer.devise=cpu",
            "unknown key 'zero_optimization.offload_optimizer.devise'; known here are buffer_count, ",
        ),
        ("bf16.enable=true", "Did you mean 'enabled'?"),
        ("flops_profiler.profile_stp=2", "Did you mean 'profile_step'?"),
        ("data_efficiency.data_sampling.num_epoch=2", "Did you mean 'num_epochs'?"),
        ("timers.throughput.enabld=true", "unknown key 'timers.throughput.enabld'"),
        ("tensorboard.jobname=x", "Did you mean 'job_name'?"),
        ("expert_parallel.autoep_sise=2", "Did you mean 'autoep_size'?"),
        ("optimizer.parms.lr=1", "unknown key 'optimizer.parms'"),
        # known keys in the wrong place
        ("state_format=8bit", "unknown key 'state_format'. Did you mean 'optimizer.params.state_format'?"),
        ("optimizer.lr=1e-3", "unknown key 'optimizer.lr'. Did you mean 'optimizer.params.lr'?"),
        ("stage=3", "unknown key 'stage'. Did you mean 'zero_optimization.stage'?"),
        ("total_num_steps=9", "unknown key 'total_num_steps'. Did you mean 'scheduler.params.total_num_steps'?"),
        ("loss_scale=0", "unknown key 'loss_scale'. Did you mean 'fp16.loss_scale'?"),
        # wrong types and values
        ("train_micro_batch_size_per_gpu=0", "train_micro_batch_size_per_gpu is 0, but must be greater than 0"),
        ("train_micro_batch_size_per_gpu=4.0", "train_micro_batch_size_per_gpu is 4.0, but must be a valid int"),
        ("gradient_accumulation_steps=two", 'gradient_accumulation_steps is "two", but must be a valid integer'),
        ("train_batch_size=true", "train_batch_size is true, but must be a valid integer"),
        ("gradient_clipping=-1", "gradient_clipping is -1, but must be greater than or equal to 0"),
        ("gradient_clipping=NaN", "gradient_clipping is NaN, but must be a finite number"),
        ('gradient_clipping="1.0"', 'gradient_clipping is "1.0", but must be a number'),
        ("steps_per_print=1.5", "steps_per_print is 1.5, but must be a valid integer"),
        ("wall_clock_breakdown=yes", 'wall_clock_breakdown is "yes", but must be a valid boolean'),
        ("communication_data_type=bf61", "communication_data_type is \"bf61\", but must be 'fp16', 'bf16'"),
        ("gradient_allreduce_op=men", "Did you mean 'mean'?"),
        ("zero_optimization=null", "zero_optimization is null, but must be an object with keys"),
        ("zero_optimization=3", "zero_optimization is 3, but must be an object with keys"),
        ("zero_optimization.stage=4", "zero_optimization.stage is 4, but must be 0, 1, 2 or 3"),
        ("zero_optimization.reduce_bucket_size=big", 'zero_optimization.reduce_bucket_size is "big", but must be'),
        ("zero_optimization.reduce_bucket_size=0", "zero_optimization.reduce_bucket_size is 0, but must be greater"),
        (
            'zero_optimization.offload_optimizer={"device": "cpuu"}',
            "zero_optimization.offload_optimizer.device is \"cpuu\", but must be 'none', 'cpu' or 'nvme'. "
            "Did you mean 'cpu'?",
        ),
        ("bf16=true", "bf16 is true, but must be an object"),
        ("fp16.loss_scale=-1", "fp16.loss_scale is -1, but fp16.loss_scale must be >= 0"),
        ("aio.queue_depth=deep", 'aio.queue_depth is "deep", but must be a number'),
        ("data_types.grad_accum_dtype=fp23", "Did you mean 'fp32'?"),
        ('checkpoint.tag_validation="sometimes"', "DeepSpeed refuses this config: Checkpoint config contains"),
        ("steps_per_print=0", "steps_per_print is 0, but must be a whole number other than 0"),
        ("gradient_predivide_factor=0", "gradient_predivide_factor is 0, but must be greater than 0"),
        ("log_level=loud", 'log_level is "loud", but must be one of debug, info'),
        ('tensor_parallel.autotp_size="2"', 'tensor_parallel.autotp_size is "2", but must be a whole number'),
        # what DeepSpeed refuses while it builds an engine
        ("zero_optimization.legacy_stage1=true", "zero_optimization.legacy_stage1 is no longer part of DeepSpeed"),
        ("zero_optimization.allgather_bucket_size=7", "allgather_bucket_size is 7, but must be even"),
        ("zero_optimization.compute_grad_norm=false", "compute_grad_norm is false, and gradient_clipping 1 (1 unless"),
        ("bf16.bf16_master_weights_and_grads=true", "takes the bits below bf16 away from AMCS"),
        ("compile.deepcompile=true", "compile.deepcompile compiles DeepSpeed's own handling of gradients"),
        ("expert_parallel.enabled=true", "expert_parallel.enabled needs parameter groups for experts alone"),
        ('torch_autocast={"enabled": true, "dtype": "fp16"}', "scales the loss in a way that the step of AMCS"),
        (
            'data_efficiency={"data_routing": {"random_ltd": {"enabled": true}}}',
            "data_efficiency.data_routing.random_ltd lacks",
        ),
        # what DeepSpeed removed
        ("amp.enabled=true", "amp is no longer part of DeepSpeed: NVIDIA Apex AMP integration has been removed"),
        ("zero_optimization.mics_shard_size=2", "zero_optimization.mics_shard_size is no longer part of DeepSpeed"),
        # what whole-block shards and the precision rule out
        ("data_types.param_dtype=fp32", "the run computes in bf16"),
        ("zero_optimization.round_robin_gradients=true", "orders parameters by the number of ranks"),
        # optimizer
        ("optimizer.type=AMSC", "optimizer.type 'AMSC' is unknown; it names one of Adafactor8, AdaMuon, AdamW8"),
        ("optimizer.type=AdamW8bit", "Did you mean 'AdamW8'?"),
        ("optimizer.type=AMSC", "Did you mean 'AMCS'?"),
        ("optimizer.params.lr=true", "lr is true, but must be"),
        ("optimizer.type=AdmW", "Did you mean 'AdamW'?"),
        ("optimizer.type=5", "optimizer.type is 5, but must be a valid string"),
        ("optimizer.params.lr=-1", "my.json: optimizer.params: "),
        ("optimizer.params.lr=NaN", "my.json: optimizer.params: "),
        ("optimizer.params.weight_decy=0.1", "Did you mean 'weight_decay'?"),
        ("optimizer.params.alpha=1.5", "alpha"),
        ("optimizer.params.state_format=8bits", "Did you mean '8bit'?"),
        # scheduler
        ("scheduler.type=WarmupCosinLR", "Did you mean 'WarmupCosineLR'?"),
        ("scheduler.params.warmup_steps=3", "unknown key 'scheduler.params.warmup_steps'; known here are"),
        ("scheduler.params.warmup_num_steps=0", "scheduler.params.warmup_num_steps is 0, but must be a positive"),
        ("scheduler.params.warmup_type=linaer", "Did you mean 'linear'?"),
        ("scheduler.params.cos_min_ratio=-0.1", "scheduler.params.cos_min_ratio is -0.1, but must be a finite"),
        # combinations
        ("fp16.enabled=true", "bf16.enabled and fp16.enabled are both true"),
        ("data_types.param_dtype=int4", "data_types.param_dtype is"),
        (
            'zero_optimization={"stage": 0, "offload_optimizer": {"device": "cpu"}}',
            "zero_optimization.offload_optimizer (device 'cpu') needs zero_optimization.stage 1, 2 or 3, and it is 0",
        ),
        (
            'zero_optimization.offload_param={"device": "cpu"}',
            "zero_optimization.offload_param (device 'cpu') needs zero_optimization.stage 3, and it is 2",
        ),
        ("zero_optimization.cpu_offload_param=true", "needs zero_optimization.stage 3, and it is 2"),
        ('zero_optimization.offload_optimizer={"device": "nvme"}', "'nvme' needs nvme_path"),
        (
            'zero_optimization={"stage": 2, "cpu_offload": true, "offload_optimizer": {"device": "cpu"}}',
            "Cannot provide deprecated parameter 'cpu_offload'",
        ),
        (
            'scheduler={"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 0.1}}',
            "scheduler.type 'OneCycle' with cycle_momentum overwrites the betas of AMCS",
        ),
        (
            'bf16={"enabled": true, "bf16_optimizer_states": true}',
            "DeepSpeed refuses this config: bf16_optimizer_states requires bf16_master_weights_and_grads",
        ),
    ],
)
def test_a_mistake_in_a_good_file_gets_one_sentence(assignment: str, sentence: str) -> None:
    message = refusal(changed("amcs_zero2", assignment))
    assert message.startswith("my.json: ")
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["amcs_zero3", "adamw_zero3"])
def test_gradients_cut_by_another_layout_are_refused_at_stage_3(name: str) -> None:
    assert "reduce_scatter" in refusal(changed(name, "zero_optimization.reduce_scatter=false"))


@pytest.mark.parametrize("name", ["amcs_zero2", "adamw_zero2", "amcs_zero3", "adamw_zero3"])
@pytest.mark.parametrize(
    "assignment",
    [
        "zero_hpz_partition_size=2",
        "zero_quantized_weights=true",
        "zero_quantized_nontrainable_weights=true",
        "zero_quantized_gradients=true",
    ],
)
def test_parts_of_zero_plus_plus_are_taken_where_they_are_tested_and_else_refused(name: str, assignment: str) -> None:
    config, setting = changed(name, f"zero_optimization.{assignment}"), assignment.split("=")[0]
    if name.endswith("2"):
        assert f"zero_optimization.{setting} acts at stage 3 alone, and stage is 2" in refusal(config)
    elif "hpz" in setting:
        validate(config, origin="my.json")
    else:
        assert f"zero_optimization.{setting} is not" in refusal(config)


@pytest.mark.parametrize("name", ["amcs_zero2", "adamw_zero2"])
def test_the_deprecated_switch_for_stage_1_is_accepted(name: str) -> None:
    validate(changed(name, "zero_optimization=true"), origin="my.json")


def test_gradients_of_another_type_are_refused_at_stage_0() -> None:
    config = changed("amcs_zero2", "zero_optimization.stage=0", "data_types.grad_accum_dtype=fp32")
    assert "without ZeRO gradients are in bf16" in refusal(config)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("optimizer.params.bettas=[0.9, 0.9]", "unknown hyper-parameter 'optimizer.params.bettas'"),
        ("optimizer.params.lr=-1", "optimizer.params.lr is -1, but must be a finite number, 0 or more"),
        ("optimizer.params.eps=Infinity", "optimizer.params.eps is Infinity, but must be"),
        ("optimizer.params.lr=high", 'optimizer.params.lr is "high", but must be'),
        ("optimizer.params.betas=[0.9, 1.0]", "optimizer.params.betas is [0.9, 1.0], but must be numbers from 0"),
        ("optimizer.params.max_grad_norm=1.0", "set gradient_clipping instead"),
        ('optimizer={"type": "SGD", "params": {"momentm": 0.9}}', "Did you mean 'momentum'?"),
        ('optimizer={"type": "Lion", "params": {"eps": 1e-8}}', "unknown hyper-parameter 'optimizer.params.eps'"),
    ],
)
def test_settings_of_other_optimizers_are_checked_too(assignment: str, sentence: str) -> None:
    assert sentence in refusal(changed("adamw_zero2", assignment))


def test_fp32_gradients_beside_bf16_are_refused_where_they_break_the_partitions() -> None:
    fp32 = "data_types.grad_accum_dtype=fp32"
    assert "partitions are not whole blocks, which AMCS needs" in refusal(changed("amcs_zero1", fp32))
    for name in ("adamw_zero1", "amcs_zero2", "amcs_zero3"):
        validate(changed(name, fp32), origin=name)


@pytest.mark.parametrize(
    ("sizes", "world_size", "sentence"),
    [
        (
            (64, 4, 2),
            4,
            "train_batch_size 64 is not 4 (train_micro_batch_size_per_gpu) * 2 (gradient_accumulation_steps) "
            "* 4 (world size) = 32.",
        ),
        ((32, 4, 2), 4, None),
        ((32, 4, None), 4, None),
        ((32, 4, None), 3, "train_batch_size 32 is not a multiple of 4 (train_micro_batch_size_per_gpu) * 3"),
        ((30, None, None), 4, "train_batch_size 30 is not a multiple of 4 (world size) = 4."),
        ((30, 4, 2), None, "train_batch_size 30 is not a multiple of 4 (train_micro"),
        ((32, 4, 2), None, None),
        ((None, 4, None), 4, None),
        ((None, None, 2), 4, "train_batch_size and train_micro_batch_size_per_gpu are both missing"),
        ((None, None, 2), None, None),
        ((64, "auto", 2), 3, "train_batch_size 64 is not a multiple of 2 (gradient_accumulation_steps) * 3"),
        (("auto", "auto", "auto"), 3, None),
    ],
)
def test_batch_sizes_must_multiply(sizes: tuple[Any, ...], world_size: int | None, sentence: str | None) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {key: size for key, size in zip(keys, sizes, strict=True) if size is not None}
    if sentence is None:
        validate(config, origin="my.json", world_size=world_size)
    else:
        assert sentence in refusal(config, world_size)


def test_ranks_that_share_a_layer_count_once() -> None:
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}
    config |= {"tensor_parallel": {"autotp_size": 2}}
    validate({**config, "gradient_accumulation_steps": 1}, origin="my.json", world_size=4)
    assert "2 (world size)" in refusal({**config, "gradient_accumulation_steps": 2}, 4)


def test_what_the_run_fills_in_may_be_missing_until_the_world_size_is_known() -> None:
    config = load_config("amcs_zero2")
    del config["scheduler"]["params"]["total_num_steps"]
    validate(config, origin="my.json")
    assert "scheduler.params lacks 'total_num_steps', which WarmupCosineLR needs" in refusal(config, 2)


@pytest.mark.parametrize(
    "config",
    [
        {"train_batch_size": 8, "zero_optimization": True, "allgather_size": 1000},
        {"train_batch_size": 8, "bfloat16": {"enabled": True}, "zero_optimization": {"stage": 2}},
        {"train_batch_size": 8, "zero_optimization": {"stage": 3, "cpu_offload_param": True, "cpu_offload": True}},
        {"train_batch_size": 8, "zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}},
        {"train_batch_size": 8, "zero_optimization": {"stage": 3, "prefetch_bucket_size": 5e7}},
        {"train_batch_size": 8, "steps_per_print": 1e9, "gradient_clipping": 1},
        {"train_batch_size": 8, "optimizer": {"type": "adamw", "params": {"torch_adam": True, "foreach": False}}},
        {"train_batch_size": 8, "optimizer": {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 1e-3}}},
        {"train_batch_size": 8, "optimizer": {"type": "Adafactor", "params": {"eps": [None, 1e-3]}}},
        {"train_batch_size": 8, "scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 10}}},
        {"train_batch_size": 8, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, 0.2]}}},
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
            "bf16": {"enabled": "auto"},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
            },
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"},
            },
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
                "overlap_comm": True,
                "sub_group_size": 1e9,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "steps_per_print": 2000,
            "wall_clock_breakdown": False,
        },
    ],
)
def test_what_deepspeed_accepts_is_accepted(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    validate(config, origin="theirs.json", world_size=4)
    assert config == before


@given(st.sampled_from([key for key in TOP_LEVEL if len(key) > 3]), st.data())
def test_a_top_level_key_with_a_letter_missing_is_refused_and_a_key_is_offered(key: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(key) - 1))
    misspelt = key[:at] + key[at + 1 :]
    if misspelt in TOP_LEVEL:
        return
    message = refusal({"train_batch_size": 1, misspelt: {}})
    assert f"unknown key {misspelt!r}" in message
    assert "Did you mean" in message


# -------------------------------------------------------------------------- agreement with DeepSpeed's reader


class Recorder(dict[str, Any]):
    """A dict that notes which keys it was asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)  # asks __contains__, where a dict's own view would not


def test_the_known_top_level_keys_are_those_deepspeed_reads() -> None:
    from deepspeed.runtime import config as reader

    content = Recorder({"train_batch_size": 1, "zero_optimization": True})
    reader.DeepSpeedConfig(content)
    removed = set(reader._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    # Read by `deepspeed.initialize`, with a process group at hand, before the config class sees it.
    outside = {"data_parallel_size", "sequence_parallel_size"}
    assert content.asked - removed == set(TOP_LEVEL) - outside
    import deepspeed

    source = Path(deepspeed.__file__).read_text()
    assert all(f'"{key}" in config' in source for key in outside)


SECTIONS = {key: hint for key, hint in get_type_hints(DeepSpeedJson).items() if hasattr(hint, "__pydantic_config__")}
READ_ELSEWHERE = {"optimizer", "scheduler", "pipeline", "torch_autocast"}


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_the_keys_of_a_section_are_those_deepspeed_reads(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    section = Recorder({"type": "AMCS"} if name in ("optimizer", "scheduler") else {})
    DeepSpeedConfig({"train_batch_size": 1, name: section})
    known = set(get_type_hints(SECTIONS[name]))
    assert section.asked <= known | {"max_grad_norm"}
    if name not in READ_ELSEWHERE:
        assert section.asked == known


def test_every_section_without_keys_of_ours_has_a_model_of_deepspeed() -> None:
    untyped = {key for key, hint in get_type_hints(DeepSpeedJson).items() if hint == dict[str, Any]}
    models = deepspeed_models()
    assert untyped | {"zero_optimization"} == {path[0] for path in models} - {"timers"}
    assert all(issubclass(model, BaseModel) for model in models.values())
