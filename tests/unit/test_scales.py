"""Factors of the rate by component, and AMCS's alpha: on a schedule, and following what is measured."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scaled_references import adam, agreement, amcs, follow_dynamic
from torch import nn

from toolkit.errors import UserError
from toolkit.optim import AMCS, RULES
from toolkit.optim.kernel import step_function

AdamW8 = RULES["AdamW8"]
STEPS = 12
SHAPES = {"wq": (30, 50), "wk": (64, 64), "up": (40, 56), "bias": (300,)}
COMPONENTS = {"wq": "attention", "wk": "attention", "up": "ffn", "bias": "ffn"}


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"wq": 0.02, "wk": 0.05, "up": 1.0, "bias": 0.5}
    return {name: sizes[name] * rng.normal(size=shape) for name, shape in SHAPES.items()}


def gradients(steps: int = STEPS) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{name: 1e-2 * rng.normal(size=shape) + 1e-3 for name, shape in SHAPES.items()} for _ in range(steps)]


def build(kind: Any, **options: Any) -> tuple[dict[str, nn.Parameter], Any]:
    params = {name: nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in start().items()}
    groups: list[dict[str, Any]] = [
        {"params": [params[name] for name in SHAPES if COMPONENTS[name] == component], "component": component}
        for component in ("attention", "ffn")
    ]
    return params, kind(groups, **{"lr": 1e-2, "compile": False, "state_format": "fp32"} | options)


def train(params: dict[str, nn.Parameter], optimizer: Any, steps: list[dict[str, np.ndarray]]) -> None:
    for by_name in steps:
        for name, p in params.items():
            p.grad = torch.tensor(by_name[name], dtype=torch.float32)
        optimizer.step()


# ---- on a schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "at"),
    [
        (0.5, lambda x: 0.5),
        ("linear", lambda x: 1 - x),
        (["linear", 1.5, 0.5], lambda x: 1.5 - x),
        (["cosine", 2, 1], lambda x: 1.5 + 0.5 * np.cos(np.pi * x)),
        ([[0.0, 3.0], [0.5, 1.0], [1.0, 2.0]], lambda x: 3 - 4 * x if x <= 0.5 else 2 * x),
    ],
)
@pytest.mark.parametrize("kind", [AMCS, AdamW8])
def test_a_scale_moves_over_the_training(kind: Any, scale: Any, at: Any) -> None:
    """The rate of one component is that of a run in which a scheduler sets it; the other's is what it was."""
    options = {"total_steps": STEPS, "weight_decay": 0.1}
    params, optimizer = build(kind, component_scales={"ffn": scale, "attention": 1.2}, **options)
    others, scheduled = build(kind, component_scales={"ffn": 1.0, "attention": 1.2}, **options)
    for t, step in enumerate(gradients(), 1):
        gamma = at((t - 1) / (STEPS - 1))
        for group in scheduled.param_groups:
            if group["component"] == "ffn":
                group["lr"] = 1e-2 * gamma
        train(params, optimizer, [step])
        train(others, scheduled, [step])
        if not isinstance(scale, float):
            assert optimizer.report()["scale_ffn"] == pytest.approx(gamma)
    for name, p in params.items():
        torch.testing.assert_close(p, others[name], rtol=1e-6, atol=1e-8)


def test_alpha_takes_ends_too() -> None:
    _, optimizer = build(AMCS, alpha=["cosine", 1.0, 0.5], total_steps=11)
    assert optimizer.rule(alpha=("cosine", 1.0, 0.5), total_steps=11).alpha_at(6) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (AdamW8, {"component_scales": {"ffn": "linear"}}, "AdamW8: total_steps is required because component_scales"),
        (AMCS, {"component_scales": {"ffn": [[0, 1]]}, "alpha": 0.5}, "component_scales has scales that move"),
        (AMCS, {"component_scales": "dynamc"}, "must be 'dynamic' or an object of scales by component. Did you mean"),
        (AMCS, {"component_scales": 2.0}, "component_scales is 2.0, but must be an object"),
        (AdamW8, {"component_scales": {"ffn": -1.0}}, "component_scales.ffn is -1.0, but must be 'linear', 'cosine'"),
        (AdamW8, {"component_scales": {"ffn": "dynamic"}}, 'component_scales.ffn is "dynamic", but must be'),
        (AdamW8, {"component_scales": {"ffn": True}}, "component_scales.ffn is true, but must be"),
        (AdamW8, {"component_scales": {"ffn": ["cosine", 1, -1]}}, "a number of 0 or more"),
        (AdamW8, {"component_scales": {"ffn": [[0.5, 1], [0.2, 2]]}}, "a scale's points must be"),
        (AMCS, {"alpha": ["cosine", 1.0, 1.5]}, "a number in [0, 1]"),
        (AMCS, {"alpha": "agreemnt"}, "Did you mean 'agreement'?"),
        (AMCS, {"alpha": "agreement", "mode": "single"}, "mode is \"single\", but must be 'dual' with alpha"),
    ],
)
def test_wrong_scales_give_one_sentence(kind: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        kind([nn.Parameter(torch.zeros(2, 2))], **settings)
    assert says in str(caught.value) and "\n" not in str(caught.value)


# ---- following what is measured -----------------------------------------------------------------------------------


def assert_follows(params: dict[str, nn.Parameter], want: dict[str, np.ndarray], most: float = 2e-5) -> None:
    for name, value in want.items():
        moved = np.linalg.norm(value - start()[name])
        assert np.linalg.norm(params[name].detach().double().numpy() - value) < most * moved, name


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dynamic_scales_follow_their_equations(compiled: bool) -> None:
    params, optimizer = build(AdamW8, component_scales="dynamic", weight_decay=0.1, compile=compiled)
    train(params, optimizer, gradients())
    want, gamma = follow_dynamic(adam(0.9, 0.95), 1e-2, start(), gradients(), COMPONENTS, lambda name: 0.1)
    assert gamma["attention"] < 0.9 and gamma["ffn"] > 1.02
    assert_follows(params, want)
    assert optimizer.report() == pytest.approx({f"scale_{name}": value for name, value in gamma.items()}, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"mode": "single"}])
def test_amcs_has_them_in_either_mode(settings: dict[str, Any]) -> None:
    """With alpha 1 both modes are AMCS, and AdamW with b_f."""
    params, optimizer = build(AMCS, component_scales="dynamic", weight_decay=0.1, alpha=1.0, **settings)
    train(params, optimizer, gradients())
    direction = amcs(lambda fast, slow, t: 1.0)
    want, gamma = follow_dynamic(direction, 1e-2, start(), gradients(), COMPONENTS, lambda name: 0.1)
    assert_follows(params, want)
    assert optimizer.report()["scale_ffn"] == pytest.approx(gamma["ffn"], rel=1e-5)


@pytest.mark.parametrize("signal", [1e-3, 1e-2])
def test_alpha_follows_the_agreement_of_both_momenta(signal: float) -> None:
    """Alone, and with scales that are measured of updates with that alpha."""
    steps = [{name: g + signal for name, g in by_name.items()} for by_name in gradients()]
    seen: list[float] = []

    def alpha(fast: Any, slow: Any, t: int) -> float:
        seen.append(agreement(fast, slow, t))
        return seen[-1]

    want, gamma = follow_dynamic(amcs(alpha), 1e-2, start(), steps, COMPONENTS, lambda name: 0.1)
    ends = (0.0, 0.6) if signal < 5e-3 else (0.6, 1.0)
    assert seen[0] == 1.0 and ends[0] < seen[-1] < ends[1]
    params, optimizer = build(AMCS, component_scales="dynamic", weight_decay=0.1, alpha="agreement")
    train(params, optimizer, steps)
    assert_follows(params, want, 1e-4)
    report = {"alpha": seen[-1]} | {f"scale_{name}": value for name, value in gamma.items()}
    assert optimizer.report() == pytest.approx(report, rel=1e-4)
    others, alone = build(AMCS, component_scales=dict.fromkeys(("attention", "ffn"), 1.0), alpha="agreement")
    train(others, alone, steps)
    assert alone.report() == pytest.approx({"alpha": seen[-1]}, rel=1e-4)  # weights are not looked at


def test_alpha_of_noise_is_0_and_of_a_steady_gradient_1() -> None:
    rng = np.random.default_rng(3)
    noise = [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(30)]
    for steps, want in ((noise, 0.0), ([noise[0]] * 30, 1.0)):
        params, optimizer = build(AMCS, alpha="agreement", component_scales=None)
        train(params, optimizer, steps)
        assert optimizer.report()["alpha"] == pytest.approx(want, abs=0.05)


def test_it_is_one_measuring_and_one_updating_kernel() -> None:
    _, optimizer = build(AMCS, component_scales="dynamic", alpha=0.5)
    group = optimizer.param_groups[0]
    rule = optimizer.rule_of(group)
    assert list(rule.passes()) == ["measure"] and rule.matrix() is None
    kept = optimizer.layout(group, torch.float32)
    names = tuple(rule.model_validate({"alpha": 0.5}).scalars(1))
    update = step_function(rule, names, kept)
    assert update.spread == () and not any(step_function(rule, names, kept, "measure").results)


def test_zeros_leave_a_scale_as_it_is() -> None:
    params, optimizer = build(AdamW8, component_scales="dynamic", weight_decay=0.0)
    train(params, optimizer, gradients(3))
    before = optimizer.report()
    with torch.no_grad():
        params["up"].zero_(), params["bias"].zero_()
    train(params, optimizer, gradients(1))
    after = optimizer.report()
    assert after["scale_ffn"] == before["scale_ffn"] and after["scale_attention"] != before["scale_attention"]
    assert all(p.isfinite().all() for p in params.values())


def test_scales_stay_within_their_bounds() -> None:
    params, optimizer = build(AdamW8, component_scales="dynamic", weight_decay=0.0, lr=0.0)
    train(params, optimizer, gradients() * 30)
    assert optimizer.report()["scale_attention"] == pytest.approx(0.5, rel=1e-2)
    assert 1.0 < optimizer.report()["scale_ffn"] <= 2.0


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_a_saved_optimizer_resumes_exactly(state_format: str) -> None:
    options = {"component_scales": "dynamic", "alpha": 0.5, "state_format": state_format}
    params, optimizer = build(AMCS, **options)
    train(params, optimizer, gradients(5))
    saved = copy.deepcopy(optimizer.state_dict())
    others, resumed = build(AMCS, **options)
    for name, p in others.items():
        p.data.copy_(params[name].data)
    resumed.load_state_dict(saved)
    for either in ((params, optimizer), (others, resumed)):
        train(*either, gradients()[5:])
    assert all(torch.equal(p, others[name]) for name, p in params.items())
    assert optimizer.report() == resumed.report()
    assert optimizer.state_bytes()["log_scale"] == 4 * len(SHAPES)


@pytest.mark.parametrize(
    ("lr_scale", "says"),
    [
        ("foo", "lr_scale must be"),
        (None, "lr_scale must be"),
        (True, "lr_scale must be"),
        (-1.0, "lr_scale must be"),
        (10**400, "lr_scale must be"),
        (["05", "12"], "lr_scale must be"),
        ([[0, True]], "lr_scale must be"),
        (["cosine", 1.5, 1], "an lr_scale that moves over the training needs total_steps"),
    ],
)
def test_the_scale_of_a_group_is_checked_when_it_is_given(lr_scale: Any, says: str) -> None:
    group = {"params": [nn.Parameter(torch.ones(2, 2))], "lr_scale": lr_scale}
    with pytest.raises(UserError) as caught:
        AdamW8([group], lr=1e-2)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_scale_of_a_group_may_move_as_a_json_says_it() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW8(
        [{"params": [p], "lr_scale": ["linear", 1, 0]}], lr=1e-2, weight_decay=0.0, total_steps=2, compile=False
    )
    p.grad = torch.ones(2, 2)
    optimizer.step()
    first = p.detach().clone()
    assert (first < 1).all()
    optimizer.step()
    assert torch.equal(p, first), "the last scale is 0"


def test_a_variant_goes_by_the_name_of_its_rule() -> None:
    with pytest.raises(UserError, match="^AMCS: total_steps is required because component_scales"):
        AMCS([nn.Parameter(torch.ones(2, 2))], alpha="agreement", component_scales={"ffn": "linear"})


def test_a_saved_state_turns_no_option_off_unseen() -> None:
    def made(**options: Any) -> Any:
        return AdamW8([nn.Parameter(torch.ones(2, 2))], compile=False, **options)

    plain, dynamic = made().state_dict(), made(component_scales="dynamic")
    with pytest.raises(ValueError, match="the saved optimizer runs AdamW8Rule, this one AdamW8DynamicRule"):
        dynamic.load_state_dict(plain)
    del plain["param_groups"][0]["component_scales"]  # as an older version wrote it
    dynamic.load_state_dict(plain)
    assert dynamic.param_groups[0]["component_scales"] == "dynamic"
