"""The words of --lora, adapters in a model, and their price."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from small_models import qwen3

from toolkit import cli
from toolkit.config import load_config
from toolkit.errors import UserError
from toolkit.estimate.predict import Case, Estimator
from toolkit.models import build_model
from toolkit.records.activations import Activations
from toolkit.records.lora import LoRA
from toolkit.run.settings import check_settings


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("r=16", LoRA()),
        ("r=8", LoRA(r=8, alpha=16)),
        ("alpha=8, r=4,dropout=0.1", LoRA(4, 8, dropout=0.1)),
        ("targets=q_proj+v_proj", LoRA(targets=("q_proj", "v_proj"))),
    ],
)
def test_words(given: str, meant: LoRA) -> None:
    assert LoRA.read(given) == meant == LoRA.read(str(meant))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("rank=16", "--lora is 'rank=16', but must be some of r=16,alpha=32,targets=all-linear,dropout=0"),
        ("target=q_proj", "Did you mean 'targets'?"),
        ("r=0", "whole number from 1 on as r"),
        ("r=1.5", "whole number from 1 on as r"),
        ("r=x", "must have a number as r, as in r=16"),
        ("r=4,r=5", "must name r once"),
        ("dropout=1", "dropout from 0 to below 1"),
        ("alpha=0", "alpha above 0"),
        ("r=nan", "must have a number as r, as in r=16"),
        ("targets=", "must name modules as targets"),
        ("", "must be some of"),
    ],
)
def test_words_that_are_none(given: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_settings(lora=given)
    assert told in str(caught.value)


def test_adapters_are_drawn_from_the_seed_alone_and_all_else_is_frozen(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = qwen3(tmp_path)

    def built(seed: int, lora: LoRA | None = LoRA(4)) -> dict[str, torch.nn.Parameter]:
        torch.rand(7)  # as ranks may have drawn before
        return dict(build_model(folder, dtype=torch.bfloat16, seed=seed, lora=lora).named_parameters())

    first, again, other, plain = built(1), built(1), built(2), built(1, None)
    trained = {name for name, p in first.items() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    for name, p in first.items():
        assert torch.equal(p, again[name])
        if ".lora_A." in name:
            assert p.any() and not torch.equal(p, other[name])
        elif name in trained:
            assert not p.any(), "with B = 0 training begins at the model itself"
        else:
            assert torch.equal(p, plain[name.replace(".base_layer.", ".")])
    assert len({first[name].float().sum().item() for name in trained if ".lora_A." in name}) == len(trained) // 2
    with pytest.raises(UserError, match="Target modules .*nowhere"):
        built(1, LoRA(targets=("nowhere",)))
    with pytest.raises(UserError, match="is no linear module"):
        built(1, LoRA(targets=("embed_tokens",)))
    with pytest.raises(UserError, match="past the adapters"):
        build_model(folder, dtype=torch.bfloat16, seed=0, lora=LoRA(), activations=Activations(tiled=True))


@pytest.mark.parametrize("stage", [2, 3])
def test_the_price_of_a_frozen_model_is_its_weights(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("peft")
    folder = qwen3(tmp_path, vocab_size=4096)
    fixed = {"model": folder, "config": load_config(f"amcs_zero{stage}"), "world_size": 2, "micro_batch": 1}
    whole, tuned = (Estimator().predict(Case(**fixed, seq_len=32, lora=lora)) for lora in (None, LoRA(4)))  # type: ignore[arg-type]
    model = build_model(folder, dtype=torch.bfloat16, seed=0, lora=LoRA(4))
    sizes = [2 * p.numel() for p in model.parameters()]
    wanted = sum(sizes) if stage == 2 else sum(sizes) / 2
    assert tuned.resident["weights"] == pytest.approx(wanted, rel=0.1)
    assert tuned.peak < whole.peak
    assert "master weights" not in tuned.resident and tuned.resident["remainder"] > 0
    state = sum(size for category, size in tuned.resident.items() if "state" in category or category == "gradients")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert state < 6 * trained + 20_000


def test_a_plan_is_for_adapters_and_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    folder, out = qwen3(tmp_path), tmp_path / "plan.json"
    line = f"plan --model {folder} --gpu-memory 1.1GB --seq-len 32 --optimizer adamw --lora r=4 --out {out}"
    monkeypatch.setattr(sys, "argv", ["toolkit", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert not ended.value.code and json.loads(out.read_text())["optimizer"]["type"] == "AdamW"
    assert printed.endswith("--lora r=4,alpha=8,targets=all-linear,dropout=0")
    assert "tiled" not in printed
