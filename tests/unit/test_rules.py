"""The rules against plain float64 references written from the papers' equations, sharing no code with them."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.errors import UserError
from toolkit.optim import AMCS, COMPONENTS, RULES, SOAM, AMCSRule

STEPS = 200
SHAPE = (37, 53)


def gradients(steps: int = STEPS, scale: float = 1e-2) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.normal(size=SHAPE) * scale * (1 + 0.5 * math.sin(i / 9)) for i in range(steps)]


def alpha_reference(kind: Any, t: int, total: int) -> float:
    fraction = min((t - 1) / (total - 1), 1.0)
    if kind == "linear":
        return 1 - fraction
    if kind == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * fraction)
    if isinstance(kind, float):
        return kind
    xs, ys = zip(*kind, strict=True)
    return float(np.interp(fraction, xs, ys))


def amcs_reference(theta: np.ndarray, grads: list[np.ndarray], rates: list[float], **h: Any) -> dict[str, np.ndarray]:
    b_f, b_s, b_v = h["betas"]
    m_fast, m_slow, v = np.zeros(SHAPE), np.zeros(SHAPE), np.zeros(SHAPE)
    for t, (g, eta) in enumerate(zip(grads, rates, strict=True), start=1):
        m_fast = b_f * m_fast + (1 - b_f) * g
        m_slow = b_s * m_slow + (1 - b_s) * g
        v = b_v * v + (1 - b_v) * g**2
        a = alpha_reference(h["alpha"], t, h["total_steps"])
        m = a * m_fast / (1 - b_f**t) + (1 - a) * m_slow / (1 - b_s**t)
        eta_c = h["gamma"] * eta
        theta = theta - eta_c * h["weight_decay"] * theta - eta_c * m / (np.sqrt(v / (1 - b_v**t)) + h["eps"])
    return {"theta": theta, "m_fast": m_fast, "m_slow": m_slow, "v": v}


def single_reference(theta: np.ndarray, grads: list[np.ndarray], rates: list[float], **h: Any) -> dict[str, np.ndarray]:
    """AMCS with mode "single"."""
    b_f, b_s, b_v = h["betas"]
    m, v, left = np.zeros(SHAPE), np.zeros(SHAPE), 1.0
    for t, (g, eta) in enumerate(zip(grads, rates, strict=True), start=1):
        a = alpha_reference(h["alpha"], t, h["total_steps"])
        b = a * b_f + (1 - a) * b_s
        m = b * m + (1 - b) * g
        v = b_v * v + (1 - b_v) * g**2
        left *= b
        eta_c = h["gamma"] * eta
        step = (m / (1 - left)) / (np.sqrt(v / (1 - b_v**t)) + h["eps"])
        theta = theta - eta_c * h["weight_decay"] * theta - eta_c * step
    return {"theta": theta, "m": m, "v": v}


def soam_reference(theta: np.ndarray, grads: list[np.ndarray], rates: list[float], **h: Any) -> dict[str, np.ndarray]:
    b1, b2 = h["betas"]
    m, v = np.zeros(SHAPE), np.zeros(SHAPE)
    for t, (g, eta) in enumerate(zip(grads, rates, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        theta = theta - eta * h["weight_decay"] * theta - eta * (m / (1 - b1**t)) / np.sqrt(v / (1 - b2**t) + h["eps"])
    return {"theta": theta, "m": m, "v": v}


def run(
    optimizer_class: Any, group: dict[str, Any], grads: list[np.ndarray], rates: list[float], **kwargs: Any
) -> dict[str, np.ndarray]:
    start = np.random.default_rng(1).normal(size=SHAPE)
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = optimizer_class([{"params": [p], **group}], **kwargs)
    for g, rate in zip(grads, rates, strict=True):
        p.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.param_groups[0]["lr"] = rate  # as every DeepSpeed scheduler does
        optimizer.step()
    result = {"theta": p.detach().numpy()}
    for key, value in optimizer.state[p].items():
        if key != "step":
            result[key] = value.flatten()[: p.numel()].view(SHAPE).numpy()
    return result


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray], rel: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        error = np.linalg.norm(got[key] - value) / np.linalg.norm(value)
        assert error < rel, (key, error)


def warm_up(lr: float, steps: int = STEPS) -> list[float]:
    return [lr * min(1.0, (i + 1) / 20) for i in range(steps)]


@pytest.mark.parametrize(
    "alpha", ["linear", "cosine", 0.3, [(0.0, 1.0), (0.5, 0.2), (1.0, 0.0)], [(0.25, 0.9), (0.75, 0.1)]]
)
@pytest.mark.parametrize(
    ("betas", "eps", "weight_decay", "component"),
    [
        ((0.9, 0.95, 0.95), 1e-8, 0.1, "attention"),
        ((0.8, 0.99, 0.999), 1e-6, 0.0, "embedding"),
        ((0.0, 0.9999, 0.99), 1e-3, 0.5, "ffn"),
    ],
)
def test_amcs_follows_its_equations(
    alpha: Any, betas: tuple[float, float, float], eps: float, weight_decay: float, component: str
) -> None:
    grads, rates = gradients(), warm_up(3e-3)
    hyper = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "alpha": alpha}
    got = run(AMCS, {"component": component}, grads, rates, total_steps=150, state_format="fp32", **hyper)
    gamma = {"attention": 1.2, "embedding": 0.8, "ffn": 1.0}[component]
    start = np.random.default_rng(1).normal(size=SHAPE)
    assert_close(got, amcs_reference(start, grads, rates, gamma=gamma, total_steps=150, **hyper))


@pytest.mark.parametrize("alpha", ["linear", "cosine", 0.3, [(0.25, 0.9), (0.75, 0.1)]])
@pytest.mark.parametrize(
    ("betas", "eps", "weight_decay", "component"),
    [((0.9, 0.95, 0.95), 1e-8, 0.1, "attention"), ((0.5, 0.9999, 0.99), 1e-3, 0.0, "ffn")],
)
def test_amcs_with_one_momentum_follows_its_equations(
    alpha: Any, betas: tuple[float, float, float], eps: float, weight_decay: float, component: str
) -> None:
    grads, rates = gradients(), warm_up(3e-3)
    hyper = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "alpha": alpha}
    settings = {"state_format": "fp32", "mode": "single"}
    got = run(AMCS, {"component": component}, grads, rates, total_steps=150, **settings, **hyper)
    gamma = {"attention": 1.2, "ffn": 1.0}[component]
    start = np.random.default_rng(1).normal(size=SHAPE)
    assert_close(got, single_reference(start, grads, rates, gamma=gamma, total_steps=150, **hyper))


@pytest.mark.parametrize(("alpha", "same"), [(1.0, "m_fast"), (0.0, "m_slow")])
def test_with_one_momentum_amcs_is_itself_where_only_one_counts(alpha: float, same: str) -> None:
    grads, rates = gradients(50), warm_up(3e-3, 50)
    settings = {"alpha": alpha, "betas": (0.8, 0.97, 0.95), "state_format": "fp32"}
    dual = run(AMCS, {}, grads, rates, **settings)
    single = run(AMCS, {}, grads, rates, mode="single", **settings)
    assert_close(single, {"theta": dual["theta"], "m": dual[same], "v": dual["v"]}, rel=1e-6)


@pytest.mark.parametrize("alpha", ["linear", "cosine", 0.3, 1.0, 0.0, [(0.25, 0.9), (0.75, 0.1)]])
def test_mixed_momenta_are_those_of_amcs(alpha: Any) -> None:
    grads, rates = gradients(), warm_up(3e-3)
    settings = {"state_format": "fp32", "total_steps": 150, "alpha": alpha}
    dual, mixed = (run(AMCS, {}, grads, rates, mode=mode, **settings) for mode in ("dual", "mixed"))
    weights = AMCS.rule(lr=1e-3, total_steps=150, alpha=alpha).mixture(len(grads))
    share = weights["fast_weight"] / sum(weights.values())
    m = share * dual["m_fast"] + (1 - share) * dual["m_slow"]
    want = {"theta": dual["theta"], "m": m, "m_far": m + dual["m_fast"] - dual["m_slow"], "v": dual["v"]}
    assert_close(mixed, want, rel=1e-4)


@pytest.mark.parametrize(("residual", "anchor", "better"), [("4bit", "8bit", 0.7), ("2bit", "4bit", 0.8)])
def test_small_formats_disturb_mixed_momenta_less(residual: str, anchor: str, better: float) -> None:
    """The error of updates at 25 to 35 % of a training, of gradients that are noise around their mean."""
    generator = torch.Generator().manual_seed(0)
    mean, *noise = torch.randn(71, 16, 512, generator=generator).unbind()

    def updates(mode: str, state_format: Any) -> list[torch.Tensor]:
        p, found = torch.nn.Parameter(torch.zeros_like(mean)), []
        settings = {"lr": 1e-3, "weight_decay": 0.0, "total_steps": 200, "compile": False}
        optimizer = AMCS([p], mode=mode, state_format=state_format, **settings)
        for g in noise:
            before, p.grad = p.detach().clone(), 0.3 * mean + g
            optimizer.step()
            found.append(p.detach() - before)
        return found[50:]

    def error(mode: str, far: str, near: str) -> float:
        pairs = zip(updates(mode, {far: residual, near: anchor, "v": "fp32"}), updates(mode, "fp32"), strict=True)
        wrong, right = map(sum, zip(*(((a - b).square().sum(), b.square().sum()) for a, b in pairs), strict=True))
        return float((wrong / right) ** 0.5)

    found = {"mixed": error("mixed", "m_far", "m"), "dual": error("dual", "m_fast", "m_slow")}
    assert found["mixed"] < better * found["dual"], found


def test_one_momentum_is_close_to_two() -> None:
    """The mixture of two averages of the same gradients, and one average in between."""
    grads, rates = gradients(), warm_up(3e-3)
    start = np.random.default_rng(1).normal(size=SHAPE)
    settings = {"state_format": "fp32", "total_steps": STEPS, "weight_decay": 0.0}
    moved = {mode: run(AMCS, {}, grads, rates, mode=mode, **settings)["theta"] - start for mode in ("dual", "single")}
    error = np.linalg.norm(moved["single"] - moved["dual"]) / np.linalg.norm(moved["dual"])
    assert 1e-4 < error < 0.05, error


def test_a_mode_is_its_groups_own() -> None:
    """Two groups with other states: each steps as it does in an optimizer of its own."""
    generator = torch.Generator().manual_seed(0)
    start, g = (torch.randn(2, 20, 30, generator=generator) for _ in range(2))
    settings = {"lr": 1e-2, "alpha": 0.5, "state_format": "8bit", "compile": False}

    def step(*groups: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
        params = [torch.nn.Parameter(start[group["number"]].clone()) for group in groups]
        optimizer = AMCS([group | {"params": [p]} for group, p in zip(groups, params, strict=True)], **settings)
        for _ in range(3):
            for p, group in zip(params, groups, strict=True):
                p.grad = g[group["number"]]
            optimizer.step()
        return optimizer, params

    one, other = {"number": 0}, {"number": 1, "mode": "single"}
    optimizer, both = step(one, other)
    for group, got in zip((one, other), both, strict=True):
        assert torch.equal(step(group)[1][0], got)
    blocks = -(-600 // 256)
    assert optimizer.state_bytes() == {
        "m_fast": blocks * 260,
        "m_slow": blocks * 260,
        "v": 2 * blocks * 260,
        "m": blocks * 260,
    }
    assert [set(held) for held in optimizer.state.values()] == [
        {"step", "m_fast", "m_fast.scale", "m_slow", "m_slow.scale", "v", "v.scale"},
        {"step", "m", "m.scale", "v", "v.scale"},
    ]
    assert optimizer.report() == {"alpha": 0.5, "beta": 0.925}
    assert copy.deepcopy(optimizer).report() == optimizer.report()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["matrix"]  # of an older version
    again, _ = step(one, other)
    again.load_state_dict(saved)
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_format_names_the_states_of_its_mode() -> None:
    p, q = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, 2))
    groups = [{"params": [p]}, {"params": [q], "mode": "single", "state_format": {"m": "4bit", "m_fast": "fp32"}}]
    formats = [group["state_format"] for group in AMCS(groups, alpha=0.5).param_groups]
    assert formats == [dict.fromkeys(("m_fast", "m_slow", "v"), "8bit"), {"m": "4bit", "v": "8bit"}]
    with pytest.raises(UserError, match="unknown state 'm_fast'; its states are m, v"):
        AMCS([p], alpha=0.5, mode="single", state_format={"m_fast": "4bit"})
    mixed = AMCS([p], alpha=0.5, mode="mixed", state_format="leanest").param_groups[0]
    assert mixed["state_format"] == {"m_far": "2bit", "m": "4bit", "v": "factored"} and mixed["weights"] == "bf16"
    with pytest.raises(UserError, match="must be 'dual' with alpha 'agreement'"):
        AMCS([p], alpha="agreement", mode="mixed")
    assert AMCS([p], alpha=0.5, mode="single").rules() != (AMCS.rule,)


@pytest.mark.parametrize(
    ("component", "component_betas", "component_lrs", "b1", "ratio"),
    [
        ("attention", None, None, 0.9, 1.0),
        ("ffn", None, None, 0.95, 1.875),
        ("ffn", {"ffn": 0.7}, {"ffn": 4e-3}, 0.7, 0.5),
        ("norm", {"norm": 0.99}, {"attention": 4e-3}, 0.99, 1.0),
    ],
)
@pytest.mark.parametrize(("eps", "weight_decay"), [(1e-8, 0.0), (1e-3, 0.1)])
def test_soam_follows_its_equations(
    component: str, component_betas: Any, component_lrs: Any, b1: float, ratio: float, eps: float, weight_decay: float
) -> None:
    grads, rates = gradients(), warm_up(8e-3)
    hyper = {"eps": eps, "weight_decay": weight_decay}
    got = run(
        SOAM,
        {"component": component},
        grads,
        rates,
        state_format="fp32",
        component_betas=component_betas,
        component_lrs=component_lrs,
        **hyper,
    )
    start = np.random.default_rng(1).normal(size=SHAPE)
    scaled = [rate * ratio for rate in rates]
    assert_close(got, soam_reference(start, grads, scaled, betas=(b1, 0.95), **hyper))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.9), (0.0, 0.97)])
def test_amcs_limits_are_adamw(alpha: float, beta: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(64, 48)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    amcs = AMCS(
        [ours],
        lr=1e-3,
        betas=(0.9, 0.97, 0.98),
        alpha=alpha,
        component_scales=dict.fromkeys(COMPONENTS, 1.0),
        state_format="fp32",
    )
    adamw = torch.optim.AdamW([theirs], lr=1e-3, betas=(beta, 0.98), eps=1e-8, weight_decay=0.1)
    for _ in range(100):
        g = torch.randn_like(start) * 1e-2
        ours.grad, theirs.grad = g.clone(), g.clone()
        amcs.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # fp32 rounding over 100 steps


def test_alpha_starts_at_one_ends_at_zero_and_stays() -> None:
    rule = AMCSRule(total_steps=640)
    assert rule.alpha_at(1) == 1.0
    assert rule.alpha_at(640) == 0.0
    assert rule.alpha_at(10_000) == 0.0
    assert AMCSRule(total_steps=1).alpha_at(1) == 1.0


@pytest.mark.parametrize("rule", [AMCS, SOAM])
def test_tiny_gradients_still_give_the_right_update(rule: Any) -> None:
    """At a gradient rms of 1e-8 fp16 scales would be useless; the 8-bit update must stay near the fp32 one."""
    extra = {"alpha": 0.5} if rule is AMCS else {}
    grads = gradients(40, scale=1e-8)
    moved = {}
    for state_format in ("fp32", "8bit"):
        p = torch.nn.Parameter(torch.zeros(SHAPE))
        optimizer = rule([p], lr=1e-3, eps=0.0, weight_decay=0.0, state_format=state_format, **extra)
        for g in grads:
            p.grad = torch.tensor(g, dtype=torch.float32)
            optimizer.step()
        moved[state_format] = p.detach().clone()
    error = (moved["8bit"] - moved["fp32"]).norm() / moved["fp32"].norm()
    assert error < 0.02, error


@pytest.mark.parametrize(
    ("rule", "settings", "says"),
    [
        (AMCS, {}, "total_steps is required"),
        (AMCS, {"alpha": 1.5}, "alpha is 1.5, but must be"),
        (AMCS, {"alpha": "linaer"}, "Did you mean 'linear'?"),
        (AMCS, {"alpha": [(0.5, 1.0), (0.2, 0.0)]}, "fractions that increase"),
        (AMCS, {"alpha": [(0.0, 1.0), (1.0, 2.0)]}, "in [0, 1]"),
        (AMCS, {"alpha": True}, "alpha is true, but must be"),
        (AMCS, {"lr": -1.0}, "lr is -1.0"),
        (AMCS, {"lr": True}, "lr is true"),
        (AMCS, {"lr": "0.1"}, 'lr is "0.1"'),
        (AMCS, {"total_steps": True}, "total_steps is true"),
        (AMCS, {"lr": float("nan")}, "lr is NaN"),
        (AMCS, {"eps": float("inf")}, "eps is Infinity"),
        (AMCS, {"betas": (0.9, 0.95)}, "betas is [0.9, 0.95], which lacks a value"),
        (AMCS, {"betas": (0.9, 1.0, 0.95)}, "betas.1 is 1.0"),
        (AMCS, {"weight_decay": -0.1}, "weight_decay is -0.1"),
        (AMCS, {"total_steps": 0}, "total_steps is 0"),
        (AMCS, {"mode": "singel", "alpha": 0.5}, "mode is"),
        (AMCS, {"component_scales": {"atention": 1.2}}, "Did you mean 'attention'?"),
        (AMCS, {"state_format": "8bits", "alpha": 0.5}, "Did you mean '8bit'?"),
        (AMCS, {"state_format": {"m_fst": "8bit"}, "alpha": 0.5}, "Did you mean 'm_fast'?"),
        (AMCS, {"state_format": 8, "alpha": 0.5}, "state_format is 8"),
        (AMCS, {"state_format": {"v": ["8bit"]}, "alpha": 0.5}, "is unknown"),
        (AMCS, {"compile": "yes", "alpha": 0.5}, "compile must be true or false"),
        (SOAM, {"beta": (0.9, 0.95)}, "Did you mean 'betas'?"),
        (SOAM, {"betas": (0.9, 0.95, 0.95)}, "betas is [0.9, 0.95, 0.95], but must be two numbers"),
        (SOAM, {"component_lrs": {"ffn": -1.0}}, "component_lrs.ffn is -1.0"),
        (SOAM, {"component_betas": {"mlp": 0.9}}, "'mlp' is no component"),
        (SOAM, {"lr": 0.0, "component_lrs": {"ffn": 1e-3}}, "needs a positive lr"),
    ],
)
def test_wrong_settings_give_one_sentence(rule: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        rule([torch.nn.Parameter(torch.zeros(2, 2))], **settings)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "betas"),
    [
        ("AMCS", [0.9, 0.95, 0.0]),
        ("SOAM", [0.9, 0.0]),
        ("AdamW8", [0.9, 0.0]),
        ("StableAdamW", [0.9, 0.0]),
        ("Lamb8", [0.9, 0.0]),
        ("QHAdam", [0.9, 0.0]),
        ("AdEMAMix", [0.9, 0.0, 0.99]),
        ("AdaMuon", [0.9, 0.0]),
        ("NorMuon", [0.9, 0.0]),
    ],
)
def test_a_second_moment_of_one_gradient_is_refused(name: str, betas: list[float]) -> None:
    """v + (1 - b2) (g^2 - v) loses a g^2 that is far below v: v would be 0."""
    place = betas.index(0.0)
    with pytest.raises(UserError, match=rf"betas.{place} is 0.0, but must be greater than or equal to 0.001"):
        RULES[name]([torch.nn.Parameter(torch.zeros(2, 256))], betas=betas)
