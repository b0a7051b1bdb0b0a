"""Second moments that are kept by rows and columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from references import FACTORED, follow
from torch import nn

from toolkit.config import DeepSpeedSettings, load_config
from toolkit.config.validate import remarks
from toolkit.errors import UserError
from toolkit.optim import AMCS, OPTIONS, RULES, RuleOptimizer
from toolkit.state.layout import MIXES

SHAPES = ((24, 300), (3, 20, 33), (6, 4, 3, 3), (1, 700), (700, 1), (130,))
"""Matrices, a stack, a convolution, a row, a column; rows end in the middle of blocks. And a vector."""
KEPT = {"m": "fp32", "v": "factored"}


def gradient(shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Rows and columns of very different size."""
    made = torch.Generator().manual_seed(step)
    size = torch.rand(shape, generator=made) ** 4 + 1e-3
    return torch.randn(shape, generator=made) * size[..., :1] * size[:1]


def train(optimizer: type[RuleOptimizer] = RULES["AdamW8"], steps: int = 5, **options: Any) -> Any:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    made = optimizer(params, **({"lr": 1e-2, "state_format": KEPT, "weights": "fp32", "compile": False} | options))
    for step in range(steps):
        for p in params:
            p.grad = gradient(tuple(p.shape), step)
        made.step()
    return made, params


def test_it_follows_its_equations() -> None:
    _, params = train(weight_decay=0.1)
    torch.manual_seed(0)
    for p, shape in zip(params, SHAPES, strict=True):
        start = torch.randn(shape).numpy()
        want = follow(FACTORED, 1e-2, 0.1, start, [gradient(shape, step).double().numpy() for step in range(5)])
        assert np.linalg.norm(p.detach().double().numpy() - want) < 1e-5 * np.linalg.norm(want - start), shape


def test_rows_and_columns_are_those_of_the_gradients_squares() -> None:
    """As Adafactor keeps them: a mean of a product of two vectors is a product of their means."""
    optimizer, params = train(steps=7)
    for p, shape in zip(params[:2], SHAPES[:2], strict=True):
        rows, columns = torch.zeros(p.numel() // shape[-1]).double(), torch.zeros(shape[-1]).double()
        for step in range(7):
            square = gradient(shape, step).double().square().view(-1, shape[-1])
            rows, columns = 0.95 * rows + 0.05 * square.mean(1), 0.95 * columns + 0.05 * square.mean(0)
        held = optimizer.state[p]
        torch.testing.assert_close(held["v.rows"].double(), rows, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(held["v.columns"].double(), columns, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_takes_it(rule: str) -> None:
    """Those without a second moment by element keep what they have in 8 bits; 1-D tensors are as exact as ever."""
    needs = {"total_steps": 10} if "total_steps" in RULES[rule].rule.model_fields else {}
    optimizer, params = train(RULES[rule], state_format="factored", lr=1e-3, **needs)
    exact, others = train(RULES[rule], state_format="8bit", lr=1e-3, **needs)
    assert all(p.isfinite().all() for p in params)
    assert torch.equal(params[-1], others[-1])
    for group in optimizer.param_groups[:-1]:
        second = [state.name for state in optimizer.rule_of(group).states if not state.signed and state.of is None]
        held = optimizer.state[group["params"][0]]
        for name in second:
            assert name not in held and held[f"{name}.rows"].dtype == torch.float32
    whole, kept = exact.state_bytes(), optimizer.state_bytes()
    assert all(kept[name] <= whole[name] for name in kept)


def test_a_byte_an_element_is_free() -> None:
    p = nn.Parameter(torch.ones(512, 1024))
    p.grad = torch.ones_like(p)
    optimizer = RULES["AdamW8"]([p], state_format="factored", weights="fp32", compile=False)
    optimizer.step()
    assert optimizer.state_bytes() == {"m": p.numel() + p.numel() // 64, "v": 4 * (512 + 1024)}
    assert optimizer.looks_at() == "rows and columns of v"


@pytest.mark.parametrize("name", ["AMCS", "NorMuon", "StableAdamW"])
def test_in_pieces_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"state_format": "factored"} | ({"total_steps": 9} if name == "AMCS" else {})
    _, whole = train(RULES[name], **options)
    monkeypatch.setattr("toolkit.optim.statistics.STRETCH", {"cpu": 512})
    _, pieces = train(RULES[name], **options)
    for p, q in zip(whole, pieces, strict=True):
        assert (p - q).norm() < 1e-4 * (p - p.mean()).norm()


def test_compiled_it_is_the_same() -> None:
    _, eager = train(steps=3)
    _, compiled = train(steps=3, compile=True)
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_parameter_without_gradient_keeps_its_rows() -> None:
    optimizer, params = train(steps=2)
    before = {key: value.clone() for key, value in optimizer.state[params[0]].items() if key != "step"}
    for p in params:
        p.grad = None if p is params[0] else torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(optimizer.state[params[0]][key], value) for key, value in before.items())


def test_a_column_of_zeros_stays_still_and_then_learns() -> None:
    p = nn.Parameter(torch.ones(8, 64))
    optimizer = RULES["AdamW8"]([p], lr=0.1, weight_decay=0.0, state_format=KEPT, weights="fp32", compile=False)
    for step in range(4):
        p.grad = torch.full_like(p, 1e-3)
        p.grad[:, :5] = 0.0 if step < 3 else 1e-3
        optimizer.step()
        assert step == 3 or bool((p[:, :5] == 1.0).all())
    assert bool((p[:, :5] < 1.0).all()) and bool(p.isfinite().all())


def test_after_one_huge_gradient_updates_are_not_too_large() -> None:
    def moved(state_format: Any) -> float:
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(64, 96))
        options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "weights": "fp32", "compile": False}
        optimizer = RULES["AdamW8"]([p], state_format=state_format, **options)
        for step in range(20):
            p.grad = torch.randn_like(p) * (1e18 if step == 5 else 1.0)
            optimizer.step()
        return p.detach().abs().max().item()

    assert moved(KEPT) < 2 * moved("fp32")


def test_parameters_of_one_optimizer_may_lie_on_several_devices() -> None:
    here, elsewhere = nn.Parameter(torch.ones(16, 32)), nn.Parameter(torch.empty(16, 32, device="meta"))
    optimizer = RULES["AdamW8"]([here, elsewhere], state_format=KEPT, weights="fp32", compile=False)
    for p in (here, elsewhere):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[here]["v.rows"].mean().item() == pytest.approx(0.05)
    assert optimizer.state[elsewhere]["v.rows"].device.type == "meta"


def test_state_that_is_only_allocated_is_whole() -> None:
    """As DeepSpeed's step on zeros at stage 0 leaves it: what is saved then can be loaded."""
    p = nn.Parameter(torch.ones(16, 32))
    optimizer = AMCS([p], state_format="factored", alpha=0.5, compile=False, weights="fp32")
    p.grad = torch.ones_like(p)
    with optimizer.allocating():
        optimizer.step()
    assert optimizer.state[p]["step"] == 0 and optimizer.state[p]["v.rows"].shape == (16,)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("size", [1e-18, 1e18, 8e18])
def test_gradients_of_any_size_are_followed(size: float) -> None:
    p = nn.Parameter(torch.ones(300, 64))
    optimizer = RULES["AdamW8"]([p], lr=0.1, eps=0.0, state_format=KEPT, weights="fp32", compile=False)
    for _ in range(3):
        p.grad = torch.full_like(p, size)
        optimizer.step()
    held = optimizer.state[p]
    assert all(held[key].isfinite().all() for key in ("v.rows", "v.columns")) and bool(p.isfinite().all())
    if size < 1e18:
        assert p.mean().item() == pytest.approx(0.7, abs=0.05)  # three steps of the rate


def test_it_is_saved_and_loaded() -> None:
    optimizer, params = train(AMCS, steps=3, state_format="factored", alpha=0.5)
    saved = optimizer.state_dict()
    fresh, others = train(AMCS, steps=0, state_format="factored", alpha=0.5)
    fresh.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
            p.grad, q.grad = gradient(tuple(p.shape), 9), gradient(tuple(p.shape), 9)
    optimizer.step()
    fresh.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_only_a_second_moment_can_be_factored() -> None:
    with pytest.raises(UserError, match="'factored' is unknown; known are fp32, 8bit, 4bit") as told:
        train(state_format={"m": "factored"})
    assert "\n" not in str(told.value)
    train(steps=1, state_format={"v": "factored"})
    assert set(MIXES["factored"].values()) == {"8bit", "factored"}


def test_lean_settles_how_weights_are_kept() -> None:
    def weights(**params: Any) -> tuple[str, str]:
        optimizer = AMCS([nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))], alpha=0.5, **params)
        config = load_config("amcs_zero2")
        given = {key: value for key, value in config["optimizer"]["params"].items() if key not in OPTIONS}
        config["optimizer"]["params"] = given | params
        return optimizer.param_groups[0]["weights"], DeepSpeedSettings.read(config).weights

    assert weights() == weights(state_format="minimal") == ("bf16+8", "bf16+8")
    assert weights(state_format="lean") == ("bf16", "bf16")
    assert weights(state_format="lean", weights="bf16+4") == ("bf16+4", "bf16+4")


def test_lean_keeps_less_than_a_byte_of_any_rule_with_one_momentum() -> None:
    p = nn.Parameter(torch.ones(512, 512, dtype=torch.bfloat16))
    for name in ("AMCS", "AdamW8", "SOAM", "NorMuon"):
        optimizer = RULES[name]([p], state_format="lean", compile=False, **({"alpha": 0.5} if name == "AMCS" else {}))
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert sum(optimizer.state_bytes().values()) < (1.05 if name == "AMCS" else 0.55) * p.numel(), name


@pytest.mark.parametrize(
    ("rule", "params", "said"),
    [
        ("AMCS", {"state_format": "leanest"}, "is made for mode 'mixed', and mode is 'dual', with which updates are"),
        ("AMCS", {"state_format": "leanest", "mode": "mixed"}, ""),
        ("AMCS", {"state_format": "leanest", "mode": "single"}, ""),
        ("AMCS", {"state_format": "lean"}, ""),
        ("AMCS", {"state_format": {"v": "fp32"}}, ""),
        ("AdamW8", {"state_format": "leanest"}, ""),
        ("AdamW", {}, ""),
    ],
)
def test_what_goes_with_a_format_is_said_where_it_is_missing(rule: str, params: dict[str, Any], said: str) -> None:
    found = " ".join(remarks({"optimizer": {"type": rule, "params": params}}))
    assert said in found and bool(found) == bool(said)
