"""Rules in files of their own, outside the package, follow the papers' equations."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from toolkit.config import DeepSpeedSettings
from toolkit.errors import UserError
from toolkit.estimate.optimizer_memory import optimizer_memory
from toolkit.optim import RULES, NonNegative, Rule, State, as_optimizer, check_params, param_groups
from toolkit.records.categories import category_of_state

PLUGINS = Path(__file__).parents[1] / "plugins"
sys.path.insert(0, str(PLUGINS))

from references import REFERENCES, follow  # noqa: E402

LINES = {"Lion": 30, "QHAdam": 45, "StableAdamW": 50, "Adafactor": 70, "Muon": 70}
SHAPES = ((40, 136), (7, 5, 3), (300, 1), (1000,), (3,), (2, 700_000))
"""No whole blocks, rows longer than what is measured at a time, and n-D."""


@pytest.fixture(scope="module", autouse=True)
def plugins() -> Iterator[None]:
    before = dict(RULES)
    for name in LINES:
        runpy.run_path(str(PLUGINS / f"{name.lower()}.py"))
    yield
    RULES.clear()
    RULES.update(before)


def train(name: str, shapes: Any, steps: int = 4, **settings: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Weights before and after, and the gradients of every step by parameter."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    start = [p.detach().clone().numpy() for p in params]
    optimizer = RULES[name](params, lr=1e-2, **settings)
    gradients: list[list[Any]] = [[] for _ in params]
    for _ in range(steps):
        for p, seen in zip(params, gradients, strict=True):
            p.grad = 1e-2 * torch.randn(p.shape, generator=generator) ** 3
            seen.append(p.grad.numpy())
        optimizer.step()
    return start, [p.detach().numpy() for p in params], gradients


@pytest.mark.parametrize("name", LINES)
def test_a_plugin_follows_its_equations(name: str) -> None:
    compiled = name in ("StableAdamW", "Adafactor")  # which takes seconds for each kernel
    start, got, gradients = train(name, SHAPES, state_format="fp32", compile=compiled)
    for before, after, seen in zip(start, got, gradients, strict=True):
        want = follow(name, 1e-2, before, seen)
        moved = np.linalg.norm(want - before)
        assert moved > 0 and np.linalg.norm(after - want) < 2e-5 * moved, (name, before.shape)


def test_what_runs_is_the_groups_own() -> None:
    """Muon in a model with components: what is kept, what a prediction counts, what a format may name, what is said."""
    model = nn.ModuleDict(
        {name: nn.Linear(32, 40) for name in ("self_attn", "lm_head")} | {"embed_tokens": nn.Embedding(50, 32)}
    )
    config = {"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "state_format": {"v": "4bit"}, "compile": False}}}
    optimizer = RULES["Muon"](param_groups(model), **config["optimizer"]["params"])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = {id(p): {key for key in held if key != "step"} for p, held in optimizer.state.items()}
    assert {name: kept[id(p)] for name, p in model.named_parameters()} == {
        "self_attn.weight": {"m", "m.scale"},
        "self_attn.bias": {"m", "v"},
        "lm_head.weight": {"m", "m.scale", "v", "v.scale"},
        "lm_head.bias": {"m", "v"},
        "embed_tokens.weight": {"m", "m.scale", "v", "v.scale"},
    }
    counted: dict[str, float] = {}
    for group in optimizer_memory(model, DeepSpeedSettings.read(config)).groups:
        blocks = sum(-(-list(model.parameters())[number].numel() // 256) for number in group.numbers)
        for category, each in group.per_element.items():
            counted[category] = counted.get(category, 0.0) + 256 * blocks * each
    held: dict[str, float] = {}
    for key, tensor in (item for state in optimizer.state.values() for item in state.items() if item[0] != "step"):
        held[category_of_state(key)] = held.get(category_of_state(key), 0.0) + tensor.nbytes
    assert counted == held and optimizer.state_bytes().keys() == {"m", "v"}
    with pytest.raises(UserError, match="unknown state 'w'; its states are m, v"):
        check_params("muon", {"state_format": {"w": "8bit"}})


def test_a_state_dict_has_the_states_of_rows_and_columns() -> None:
    def make(shape: tuple[int, int]) -> tuple[list[nn.Parameter], Any]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(size, generator=generator)) for size in (shape, (7,))]
        return params, RULES["Adafactor"](params, compile=False)

    def step(params: list[nn.Parameter], optimizer: Any, seed: int) -> None:
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    (params, optimizer), (others, again) = make((5, 3)), make((5, 3))
    step(params, optimizer, 1)
    with torch.no_grad():
        for p, other in zip(params, others, strict=True):
            other.copy_(p)
    again.load_state_dict(optimizer.state_dict())
    for pair in ((params, optimizer), (others, again)):
        step(*pair, 2)
    assert all(map(torch.equal, params, others))
    with pytest.raises(ValueError, match=r"state 'r' of parameter 0 is torch.float32 \[5\], but .* \[3\]"):
        make((3, 5))[1].load_state_dict(optimizer.state_dict())


def test_a_state_is_the_same_in_all_variants() -> None:
    class One(Rule):
        states = (State("m"),)
        lr: NonNegative = 1.0

        @classmethod
        def variant(cls, settings: Any, *, component: str, matrix: bool) -> type[Rule]:
            return One if matrix else Other

    class Other(One):
        states = (State("m", signed=False),)

    with pytest.raises(UserError, match="Other: state 'm' is another one in another variant of the rule"):
        as_optimizer(One)


@pytest.mark.parametrize("name", LINES)
def test_a_plugin_is_short(name: str) -> None:
    text = (PLUGINS / f"{name.lower()}.py").read_text()
    assert len(text[text.index("class ") :].rstrip().splitlines()) <= LINES[name]
    assert name in REFERENCES


def test_a_prediction_says_what_it_leaves_out() -> None:
    from toolkit.estimate.predict import Case, Estimator

    for name, says in (("Lion", False), ("Adafactor", True), ("Muon", True)):
        config = {"optimizer": {"type": name, "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 2}}
        settings = config | {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
        case = Case("qwen3-tiny", settings, 2, 1, 8, device="cpu", activation_checkpointing=False, loss="plain")
        remarks = Estimator().predict(case).remarks
        assert any("whole parameters" in remark for remark in remarks) == says, remarks
