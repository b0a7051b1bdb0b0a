"""The HF Trainer and a plain `deepspeed.initialize` run this package's optimizers by name, in two real ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ranks import launch

WORLD_SIZE, STEPS = 2, 6
AUTO = "auto"
TRAINER: dict[str, Any] = {
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "bf16": {"enabled": AUTO},
    "optimizer": {"type": "AMCS", "params": {"lr": AUTO, "weight_decay": AUTO}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": AUTO,
            "warmup_min_lr": AUTO,
            "warmup_max_lr": AUTO,
            "warmup_num_steps": AUTO,
            "warmup_type": "linear",
        },
    },
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 20_000},
}
PLAIN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "optimizer": {"type": "SOAM", "params": {"lr": 3e-3}},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 20_000},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote; both ways in one start of the processes."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "trainer.json").write_text(json.dumps(TRAINER))
    settings = {"steps": STEPS, "trainer": str(folder / "trainer.json"), "deepspeed": PLAIN}
    return launch(folder, WORLD_SIZE, Path(__file__).with_name("hf_worker.py"), settings)


def by_component(rank: dict[str, Any], key: str) -> dict[str, Any]:
    return {group["component"]: group[key] for group in rank["groups"]}


@pytest.mark.parametrize(("way", "optimizer"), [("trainer", "AMCS"), ("deepspeed", "SOAM")])
def test_the_named_optimizer_ran_with_components_and_8_bit_shards(
    ranks: list[dict[str, Any]], way: str, optimizer: str
) -> None:
    for rank in (result[way] for result in ranks):
        assert rank["optimizer"] == optimizer
        assert rank["steps"] == [STEPS]
        assert set(by_component(rank, "component")) == {"embedding", "attention", "norm", "ffn", "head"}
        for component, formats in by_component(rank, "state_format").items():
            assert set(formats.values()) == {"fp32" if component == "norm" else "8bit"}
        assert {"torch.int8", "torch.uint8"} < set(rank["dtypes"])
        share = rank["parameters"] / WORLD_SIZE
        # Whole blocks on every rank: padding shows on a model this small, at stage 3 by each parameter.
        for held in rank["state_bytes"].values():
            assert share < held < share * (1.1 if way == "trainer" else 1.4)


@pytest.mark.parametrize("way", ["trainer", "deepspeed"])
def test_the_loss_falls(ranks: list[dict[str, Any]], way: str) -> None:
    for rank in ranks:
        losses = rank[way]["losses"]
        assert len(losses) == STEPS
        assert all(math.isfinite(loss) for loss in losses)
        assert losses[-1] < losses[0] - 0.3


def test_the_trainer_fills_in_its_arguments(ranks: list[dict[str, Any]]) -> None:
    for rank in (result["trainer"] for result in ranks):
        assert by_component(rank, "lr_scale") == {
            "embedding": 0.8,
            "attention": 1.2,
            "norm": 1.0,
            "ffn": 1.0,
            "head": 0.8,
        }
        matrices = dict.fromkeys(("embedding", "attention", "ffn", "head"), 0.05)
        assert by_component(rank, "weight_decay") == matrices | {"norm": 0.0}
        assert set(by_component(rank, "total_steps").values()) == {STEPS}
        assert rank["alphas"] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
        # Up in two steps, then down in four. DeepSpeed's schedules start at 0 for two steps, not one.
        assert rank["rates"] == pytest.approx([0.0, 0.5e-2, 1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
        assert rank["clipping"] == 0.5
        assert rank["accumulation"] == 2


def test_the_trainer_trains_adapters_beside_a_frozen_model(ranks: list[dict[str, Any]]) -> None:
    for rank in (result["adapters"] for result in ranks):
        assert rank["unchanged"] and 0 < rank["trained"] < rank["parameters"] / 5
        assert set(by_component(rank, "component")) == {"attention", "ffn"}
        for held in rank["state_bytes"].values():
            assert held < rank["parameters"] / 4, "of adapters alone, padded to whole blocks"
        assert all(math.isfinite(loss) for loss in rank["losses"]) and rank["losses"][-1] < rank["losses"][0]


def test_components_of_a_plain_deepspeed_run(ranks: list[dict[str, Any]]) -> None:
    for rank in (result["deepspeed"] for result in ranks):
        betas, scales = by_component(rank, "betas"), by_component(rank, "lr_scale")
        assert (betas["ffn"], betas["attention"]) == ((0.95, 0.95), (0.9, 0.95))
        assert (scales["ffn"], scales["attention"]) == (pytest.approx(1.5e-2 / 8e-3), 1.0)
