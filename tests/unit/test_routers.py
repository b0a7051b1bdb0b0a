"""Tokens of experts, counted in models of several families and reported; on 2 ranks: `distributed/test_initial.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from report_runs import write_run
from torch import distributed

from toolkit.report import build_report, render
from toolkit.run.routers import Routers, summed_up

TOKENS = 24


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def trained(family: str) -> tuple[Any, Routers]:
    kind, arguments, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments)).train()
    return model, Routers(SimpleNamespace(module=model, device=torch.device("cpu")))


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("Mixtral", ["0", "1"]),
        ("Qwen2-MoE", ["0", "1"]),
        ("Qwen3-MoE", ["0", "1"]),
        ("DeepSeek-V3", ["1"]),
        ("GPT-OSS", ["0", "1"]),
    ],
)
@pytest.mark.usefixtures("alone")
def test_each_expert_counts_its_tokens(family: str, layers: list[str]) -> None:
    """Beside the gradients: those of an expert that got no token are zero, and no others'."""
    model, routers = trained(family)
    tokens = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    model(tokens, labels=tokens).loss.backward()
    found = routers.step()()
    assert found["routers"]["layers"] == layers
    for name, unused, idlest in zip(layers, found["routers"]["unused"], found["routers"]["idlest"], strict=True):
        [gradient] = [
            param.grad
            for key, param in model.named_parameters()
            if f"layers.{name}." in key and key.endswith("experts.gate_up_proj")
        ]
        assert unused == int((gradient.flatten(1).abs().amax(1) == 0).sum())
        assert (idlest == 0) == (unused > 0)
    assert routers.step()() == {}, "a step that saw no token says nothing"


@pytest.mark.usefixtures("alone")
def test_a_pass_that_is_of_no_step_can_be_forgotten() -> None:
    model, routers = trained("Qwen3-MoE")
    model(torch.zeros(1, 4, dtype=torch.int64))
    routers.forget()
    assert routers.step()() == {}


@pytest.mark.usefixtures("alone")
def test_only_training_counts_and_nothing_hangs_on_a_dense_model() -> None:
    model, routers = trained("Qwen3-MoE")
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        model.eval()(tokens)
    assert routers.step()() == {}
    dense, none = trained("Llama")
    assert none.step()() == {}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in dense.modules())


def test_loads_are_relative_to_an_even_share() -> None:
    layers = {"0": torch.tensor([6, 2, 0, 0]), "1": torch.tensor([5, 5, 5, 5])}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert summed_up(layers) == {
        "expert_load": 3.0,
        "experts_unused": 2,
        "routers": {
            "layers": ["0", "1"],
            "busiest": [3.0, 1.0],
            "idlest": [0.0, 1.0],
            "evenness": [pytest.approx(entropy, rel=1e-3), 1.0],
            "unused": [2, 0],
        },
    }
    assert summed_up({"0": torch.zeros(4, dtype=torch.int64)}) == {}


def with_routers(folder: Path, changed: dict[str, Any]) -> Path:
    """A run whose layer 1 gets more uneven by one expert in every step, from 1 to 40."""
    path = write_run(folder) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        found = summed_up({"0": torch.tensor([10, 10, 20, 0]), "1": torch.tensor([line["step"], 1])})
        line |= found | {"routers": found["routers"] | changed}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_report_shows_the_layers_with_the_busiest_first(tmp_path: Path) -> None:
    report = build_report([with_routers(tmp_path / "run", {})])
    [run] = report.runs
    assert run.training is not None
    first, second = run.training.experts
    assert (first.layer, first.busiest, first.unused, first.over) == ("0", 2.0, 1.0, 10)
    assert second.busiest == pytest.approx(sum(2 * step / (step + 1) for step in range(31, 41)) / 10, abs=1e-3)
    text = render(report, "markdown")
    assert "## Experts" in text and "in a mean step of the last 10" in text
    rows = [line for line in text.split("## Experts")[1].splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:4]] == ["0", "1"]
    assert "Experts" not in render(build_report([write_run(tmp_path / "dense")]), "markdown")


def test_a_damaged_line_about_experts_is_a_sentence(tmp_path: Path) -> None:
    [run] = build_report([with_routers(tmp_path / "run", {"unused": [1]})]).runs
    assert any("Line 1 of metrics.jsonl is not a step: routers" in one.sentence for one in run.problems)
