"""The dry run of few layers, stretched, is that of all, event by event."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import SHAPE, qwen3

from toolkit.estimate import stretch
from toolkit.estimate.dry_run import DryRun, dry_run, pass_of
from toolkit.models.build import CausalLM
from toolkit.records.activations import Activations
from toolkit.records.lora import LoRA

LAYERS = stretch.LAYERS + 5
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


def facts(run: DryRun) -> dict[str, Any]:
    """All that is predicted from it."""
    ordered = sorted(run.storages.lifetimes, key=lambda x: x.allocated_at)
    return {
        "lifetimes": [(x.allocated_at, x.freed_at, x.bytes, x.phase, x.category, x.parameter) for x in ordered],
        "gradients": [x.what for x in ordered if x.parameter is not None],
        "phases": run.storages.phases,
        "now": run.storages.now,
        "arrivals": run.arrivals,
        "calls": [asdict(call) for call in sorted(run.calls)],
        "parameters": run.parameters,
        "others": (run.per_block, run.loss, run.activations, run.offloaded, run.attention, run.widens),
        "model": [name for name, _ in run.model.named_parameters()],
    }


def both(monkeypatch: pytest.MonkeyPatch, model: str, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """What a whole dry run finds and what `dry_run_of` does; and whether that ran the whole model."""
    ran: list[CausalLM] = []

    def counted(whole: CausalLM, **more: Any) -> DryRun:
        ran.append(whole)
        return pass_of(whole, **more)

    monkeypatch.setattr(stretch, "pass_of", counted)
    settings = {"dtype": torch.bfloat16, "micro_batch": 2, "seq_len": 16, "device": "cuda"} | settings
    return facts(dry_run(model, **settings)), facts(stretch.dry_run_of(model, **settings)), bool(ran)


@pytest.mark.parametrize(
    "settings",
    [
        *({"activations": Activations.read(words)} for words in ("full", "checkpoint", "tiled", "offload,tiled")),
        *({"activations": Activations.read(words), "device": "cpu"} for words in ("full", "checkpoint,tiled")),
        {"loss": "plain", "attention": "eager", "conversations": True},
        {"lora": LoRA(r=2)},
    ],
    ids=str,
)
def test_it_is_the_dry_run_of_all_layers(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stretched, ran_all = both(monkeypatch, qwen3(tmp_path, num_hidden_layers=LAYERS), **settings)
    assert stretched == whole and not ran_all


def test_so_it_is_of_mixtures_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Qwen3MoeConfig(**SHAPE | EXPERTS | {"num_hidden_layers": LAYERS, "vocab_size": 96})
    config.save_pretrained(tmp_path)
    whole, stretched, ran_all = both(monkeypatch, str(tmp_path), activations=Activations(checkpoint=True))
    assert stretched == whole and not ran_all


@pytest.mark.parametrize(
    "changed",
    [
        {"num_hidden_layers": stretch.LAYERS},
        {"layer_types": ["sliding_attention", "full_attention"] * 6 + ["full_attention"], "sliding_window": 8},
    ],
    ids=["few", "different"],
)
def test_layers_that_are_few_or_not_alike_are_all_run(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qwen3(tmp_path, **{"num_hidden_layers": LAYERS, "use_sliding_window": True} | changed)
    whole, found, ran_all = both(monkeypatch, model)
    assert found == whole and ran_all


def test_every_second_block_is_not_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3(tmp_path, num_hidden_layers=LAYERS)
    whole, found, _ = both(monkeypatch, model, activations=Activations.read("checkpoint:2"))
    assert found == whole


def test_a_layer_that_takes_other_moments_is_seen(tmp_path: Path) -> None:
    """What is special of one call cannot be seen in a module."""
    model = qwen3(tmp_path, num_hidden_layers=LAYERS)
    settings: Any = {"dtype": torch.bfloat16, "micro_batch": 2, "seq_len": 16, "device": "cuda"}
    short = dry_run(model, layers=stretch.LAYERS, **settings)
    whole = stretch.blueprint(model, dtype=torch.bfloat16)
    assert stretch.stretched(short, whole) is not None
    middle = next(scope for scope in short.storages.scopes if scope.name.endswith("layers.4")).opened
    odd = next(x for x in short.storages.lifetimes if x.allocated_at > middle)
    odd.bytes += 1
    assert stretch.stretched(short, whole) is None
