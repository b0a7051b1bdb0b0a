"""The first weights of a model are those of its seed, to the last bit, at every number of ranks and ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from initial_worker import digest
from ranks import launch
from small_models import SHAPE, qwen3

from toolkit.models import PRESETS, build_model
from toolkit.state.codecs import BLOCK

WORKER = Path(__file__).with_name("initial_worker.py")
STAGES = (2, 3)
SECONDS = 0.25

GATHERED = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
"""Every weight, when it is needed."""

Results = list[list[dict[str, Any]]]


def config(stage: int) -> dict[str, Any]:
    params = {"lr": 1e-3, "state_format": "lean", "weights": "bf16", "compile": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AMCS", "params": params},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1024, **(GATHERED if stage == 3 else {})},
    }


def experts(folder: Path) -> str:
    """The mixture-of-experts preset in miniature."""
    preset = PRESETS["qwen3-30b-a3b"]
    few = {"vocab_size": 96, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    small = transformers.AutoConfig.for_model(preset.family, **(dict(preset.config) | SHAPE | few))
    small.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bool]]:
    """Folders by name, and whether weights are read from them."""
    root = tmp_path_factory.mktemp("models")
    tied = qwen3(root / "tied", tie_word_embeddings=True)
    build_model(tied, dtype=torch.bfloat16, seed=3).hf.save_pretrained(tied)
    untied = qwen3(root / "untied")
    return {"tied": (tied, False), "untied": (untied, False), "experts": (experts(root / "experts"), False)} | {
        "loaded": (tied, True)
    }


@pytest.fixture(scope="module")
def started(models: dict[str, tuple[str, bool]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """By a number of ranks what each found, of each model at each stage, and of its pace."""
    asleep = {"seconds": SECONDS, "pace": models["untied"][0]}

    @cache
    def found(ranks: int) -> Results:
        builds = [
            {"build": folder, "config": config(stage), "load": load}
            for folder, load in models.values()
            for stage in STAGES
        ]
        paces = [asleep | {"config": config(stage)} for stage in STAGES] if ranks == 2 else []
        twice = {"gradient_accumulation_steps": 2}
        routed = [{"routed": models["experts"][0], "config": config(stage) | twice} for stage in STAGES]
        steps = builds + paces + (routed if ranks == 2 else [])
        return launch(tmp_path_factory.mktemp("ranks"), ranks, WORKER, {"steps": steps})

    return found


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_weights_are_the_seeds_on_every_rank(
    ranks: int, models: dict[str, tuple[str, bool]], started: Callable[[int], Results]
) -> None:
    cases = [(name, stage) for name in models for stage in STAGES]
    seen = set()
    for case, (name, stage) in enumerate(cases):
        folder, load = models[name]
        plain = build_model(folder, dtype=torch.bfloat16, seed=11, from_checkpoint=load)
        expected = digest(plain.hf)
        seen.add(expected["model.embed_tokens.weight"])
        for rank in range(ranks):
            found = started(ranks)[rank][case]
            assert found["model"] == expected and found["engine"] == expected, (name, stage, rank)
            assert found["tied"] == (folder == models["tied"][0])
            if stage == 3:
                total = sum(parameter.numel() for parameter in plain.parameters())
                padding = BLOCK * len(expected)  # each parameter's part is whole blocks
                assert total / ranks <= found["held"] <= total / ranks + padding
    assert len(seen) == 2  # of the seed, and those that were loaded


@pytest.mark.parametrize("stage", STAGES)
def test_a_slow_rank_is_told_from_those_that_wait_for_it(stage: int, started: Callable[[int], Results]) -> None:
    quick, slow = (rank[STAGES.index(stage) - 2 * len(STAGES)] for rank in started(2))
    assert slow["alone"] > quick["alone"] + 0.5 * SECONDS
    assert stage == 2 or quick["passes"] > 0.5 * SECONDS, "it does not wait for the other in its forward pass"


@pytest.mark.parametrize("stage", STAGES)
def test_tokens_of_experts_are_counted_over_micro_batches_and_ranks(
    stage: int, started: Callable[[int], Results]
) -> None:
    ranks: list[Any] = [rank[STAGES.index(stage) - len(STAGES)] for rank in started(2)]
    for first, second in zip(*ranks, strict=True):
        counted = first["counted"]
        assert counted == second["counted"]
        assert counted["routers"]["layers"] == ["0", "1"]
        unused = 0
        for layer in range(2):
            tokens = first["chosen"][layer] + second["chosen"][layer]
            assert len(tokens) == 2 * 2 * 2 * 8  # ranks, micro-batches, experts of a token, tokens that have a next one
            shares = [tokens.count(expert) / len(tokens) for expert in range(4)]
            of = {name: column[layer] for name, column in counted["routers"].items()}
            assert of["busiest"] == pytest.approx(4 * max(shares), rel=1e-3)
            assert of["idlest"] == pytest.approx(4 * min(shares), rel=1e-3)
            entropy = -sum(share * math.log(share) for share in shares if share)
            assert of["evenness"] == pytest.approx(entropy / math.log(4), rel=1e-3)
            assert of["unused"] == shares.count(0)
            unused += shares.count(0)
        assert counted["expert_load"] == max(counted["routers"]["busiest"])
        assert counted["experts_unused"] == unused
