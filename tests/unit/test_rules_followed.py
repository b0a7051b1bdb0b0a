"""Rules, the package's and those in files of their own, against the papers' equations and against one another."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references import REFERENCES, SETTINGS, follow
from torch import nn

from toolkit.config import DeepSpeedSettings
from toolkit.errors import UserError
from toolkit.estimate.optimizer_memory import optimizer_memory
from toolkit.optim import (
    COMPONENTS,
    RULES,
    NonNegative,
    Rule,
    State,
    as_optimizer,
    check_params,
    newton_schulz,
    param_groups,
)
from toolkit.records.activations import Activations
from toolkit.records.categories import category_of_state

PLUGINS = Path(__file__).parents[1] / "plugins"
LINES = {"Lion": 30}
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


def train(
    made: Any, shapes: Any, steps: int = 4, dtype: torch.dtype = torch.float32, shrink: float = 1.0, **settings: Any
) -> tuple[list[Any], list[Any], list[Any]]:
    """Weights before and after, and the gradients of every step by parameter; each step's are `shrink` times as large.

    `made` is the name of a rule or a class of torch.optim.
    """
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    start = [p.detach().clone().float().numpy() for p in params]
    optimizer = (RULES[made] if isinstance(made, str) else made)(params, **settings)
    gradients: list[list[Any]] = [[] for _ in params]
    for step in range(steps):
        for p, seen in zip(params, gradients, strict=True):
            g = 1e-2 * shrink**step * torch.randn(p.shape, generator=generator) ** 3
            p.grad = g.to(dtype)
            seen.append(g.numpy())
        optimizer.step()
    return start, [p.detach().float().numpy() for p in params], gradients


def assert_same_way(one: Any, other: Any, most: float = 1e-5) -> None:
    """Two trainings from the same weights have moved them alike."""
    for before, after, want in zip(one[0], one[1], other[1], strict=True):
        moved = np.linalg.norm(want - before)
        assert moved > 0 and np.linalg.norm(after - want) < most * moved, before.shape


@pytest.mark.parametrize("name", REFERENCES)
def test_a_rule_follows_its_equations(name: str) -> None:
    compiled = name in ("StableAdamW", "Adafactor8")  # which takes seconds for each kernel
    settings = SETTINGS.get(name, {})
    start, got, gradients = train(
        name, SHAPES, lr=1e-2, weight_decay=0.1, state_format="fp32", compile=compiled, **settings
    )
    for before, after, seen in zip(start, got, gradients, strict=True):
        want = follow(name, 1e-2, 0.1, before, seen)
        moved = np.linalg.norm(want - before)
        # Muon8's polynomial makes differences larger: its slope at 0 is 3.4445 to the fifth.
        most = 1e-4 if name == "Muon8" else 2e-5
        assert moved > 0 and np.linalg.norm(after - want) < most * moved, (name, before.shape)


def test_every_rule_of_the_package_has_a_reference() -> None:
    own = {name for name, made in RULES.items() if made.rule.__module__.startswith("toolkit.")}
    assert own == REFERENCES.keys() - LINES.keys()


def test_what_runs_is_the_groups_own() -> None:
    """Muon8 in a model with components: what is kept, what a prediction counts, what a format may name."""
    model = nn.ModuleDict(
        {name: nn.Linear(32, 40) for name in ("self_attn", "lm_head")} | {"embed_tokens": nn.Embedding(50, 32)}
    )
    config = {"optimizer": {"type": "Muon8", "params": {"lr": 1e-3, "state_format": {"v": "4bit"}, "compile": False}}}
    optimizer = RULES["Muon8"](param_groups(model), **config["optimizer"]["params"])
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
        check_params("muon8", {"state_format": {"w": "8bit"}})


def test_a_state_dict_has_the_states_of_rows_and_columns() -> None:
    def make(shape: tuple[int, int]) -> tuple[list[nn.Parameter], Any]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(size, generator=generator)) for size in (shape, (7,))]
        return params, RULES["Adafactor8"](params, compile=False)

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


# ---- other libraries, and what a rule is in a limit ----------------------------------------------------------------

FEW = ((40, 136), (300,))
PLAIN = {"lr": 1e-2, "state_format": "fp32", "compile": False}


def test_adamw8_is_torchs_adamw() -> None:
    known = {"lr": 1e-2, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.3}
    ours = train("AdamW8", FEW, 10, **(PLAIN | known))
    assert_same_way(ours, train(torch.optim.AdamW, FEW, 10, **known))


def test_adafactor8_is_torchs_adafactor() -> None:
    """Whose first eps is a floor for v and not a part of it."""
    known = {"lr": 2e-2, "beta2_decay": -0.7, "d": 1.5, "weight_decay": 0.3}
    ours = train("Adafactor8", FEW, 10, eps=(0.0, 1e-3), **(PLAIN | known))
    assert_same_way(ours, train(torch.optim.Adafactor, FEW, 10, eps=(0.0, 1e-3), **known))


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_adamw8_is_amcs_with_one_momentum_bit_for_bit(state_format: str) -> None:
    """With alpha 1 and the same scales, in bf16 with remainders."""
    scales = dict.fromkeys(COMPONENTS, 1.0)
    common = {"state_format": state_format, "compile": False, "dtype": torch.bfloat16, "lr": 1e-2}
    ours = train("AdamW8", FEW, 10, **common)
    amcs = train("AMCS", FEW, 10, alpha=1.0, component_scales=scales, **common)
    for one, other in zip(ours[1], amcs[1], strict=True):
        assert np.array_equal(one, other)


def test_adamw8_with_a_ramp_is_amcs_single() -> None:
    scales = {"attention": 1.2, "other": 0.7}
    ours = train("AdamW8", FEW, 10, beta1_end=0.95, total_steps=8, component_scales=scales, **PLAIN)
    settings = {"mode": "single", "total_steps": 8, "component_scales": scales}
    assert_same_way(ours, train("AMCS", FEW, 10, **settings, **PLAIN), 1e-6)
    assert RULES["AdamW8"].rule(beta1_end=0.95, total_steps=8).report(20) == {"beta1": 0.95}


def test_limits_are_adamw() -> None:
    common = PLAIN | {"eps": 1e-7, "weight_decay": 0.1}
    want = train("AdamW8", FEW, 10, betas=(0.9, 0.97), **common)
    qhadam = train("QHAdam", FEW, 10, betas=(0.9, 0.97), nus=(1.0, 1.0), **common)
    assert_same_way(qhadam, want)
    assert_same_way(train("AdEMAMix", FEW, 10, betas=(0.9, 0.97, 0.9999), alpha=0.0, total_steps=10, **common), want)
    shrinking = {"shrink": 0.7, "betas": (0.9, 0.97)}  # so that g^2 stays below v
    assert_same_way(
        train("StableAdamW", FEW, 10, **shrinking, **common), train("AdamW8", FEW, 10, **shrinking, **common)
    )
    no_trust = {"min_coeff": 1.0, "max_coeff": 1.0, "betas": (0.9, 0.97)}
    assert_same_way(train("Lamb8", FEW, 10, **no_trust, **common), want)


def test_lion8_is_the_plugin_of_thirty_lines() -> None:
    for one, other in zip(
        train("Lion8", FEW, 5, lr=1e-3, weight_decay=0.1, compile=False)[1],
        train("Lion", FEW, 5, lr=1e-3, weight_decay=0.1, compile=False)[1],
        strict=True,
    ):
        assert np.array_equal(one, other)


def test_muon8_is_torchs_muon() -> None:
    """Whose products are in bf16: hence the few percent."""
    shapes, known = ((40, 136), (136, 40)), {"lr": 1e-2, "weight_decay": 0.1}
    for scaling, adjust in (("moonlight", "match_rms_adamw"), ("keller", "original")):
        ours = train("Muon8", shapes, 5, scaling=scaling, state_format="fp32", compile=False, **known)
        assert_same_way(ours, train(torch.optim.Muon, shapes, 5, adjust_lr_fn=adjust, **known), 0.03)


@pytest.mark.parametrize(("coefficients", "low", "high"), [("muon", 0.68, 1.14), ("polar-express", 0.86, 1.13)])
def test_singular_values_end_near_one(coefficients: str, low: float, high: float) -> None:
    table = {"muon": newton_schulz.MUON, "polar-express": newton_schulz.POLAR_EXPRESS}[coefficients]
    torch.manual_seed(0)
    u, _, w = torch.linalg.svd(torch.randn(64, 96, dtype=torch.float64), full_matrices=False)
    matrix = (u * torch.logspace(0, -1.0, 64, dtype=torch.float64)) @ w
    for one in (matrix, matrix.T):
        values = torch.linalg.svdvals(newton_schulz.orthogonal(one, table))
        assert low < values.min() and values.max() < high, (values.min(), values.max())
    kinds = {RULES["Muon8"].rule.variant({"coefficients": coefficients}, component="ffn", matrix=True) for _ in "12"}
    [kind] = kinds
    torch.testing.assert_close(kind.transform(matrix), 0.2 * 96**0.5 * newton_schulz.orthogonal(matrix, table))
    for name in ("NorMuon", "AdaMuon"):
        kind = RULES[name].rule.variant({"coefficients": coefficients}, component="ffn", matrix=True)
        torch.testing.assert_close(kind.transform(matrix), newton_schulz.orthogonal(matrix, table))


@pytest.mark.parametrize("name", ["Muon8", "NorMuon", "AdaMuon", "SinkGD", "SCALE"])
def test_what_is_no_hidden_matrix_is_trained_with_adamw(name: str) -> None:
    [optimizer] = [
        RULES[name]([{"params": [p], "component": "norm"}], lr=1e-2, adamw_lr=3e-3, compile=False)
        for p in [nn.Parameter(torch.ones(300))]
    ]
    other = RULES["AdamW8"]([nn.Parameter(torch.ones(300))], lr=3e-3, compile=False)
    for made in (optimizer, other):
        [p] = made.param_groups[0]["params"]
        for step in range(3):
            p.grad = torch.linspace(-1, 1 + step, 300)
            made.step()
    torch.testing.assert_close(optimizer.param_groups[0]["params"][0], other.param_groups[0]["params"][0])
    with pytest.raises(UserError, match="adamw_lr needs a positive lr"):
        RULES[name]([nn.Parameter(torch.ones(3))], lr=0.0, adamw_lr=3e-3)


def test_lamb_moves_what_has_no_size() -> None:
    p = nn.Parameter(torch.zeros(16, 16))
    p.grad = torch.ones(16, 16)
    RULES["Lamb8"]([p], lr=1e-2, state_format="fp32", compile=False).step()
    torch.testing.assert_close(p.detach(), torch.full((16, 16), -1e-2), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("AdamW8", {"beta1_end": 0.95}, "total_steps is required because beta1_end=0.95"),
        ("AdamW8", {"component_scales": {"atention": 1.2}}, "Did you mean 'attention'?"),
        ("AdamW8", {"betas": (0.9, 0.95, 0.95)}, "betas is [0.9, 0.95, 0.95]"),
        ("AdEMAMix", {}, "total_steps is required"),
        ("AdEMAMix", {"alpha_warmup": 10}, "total_steps is required"),
        ("QHAdam", {"nus": (1.5, 1.0)}, "nus.0 is 1.5"),
        ("Adafactor8", {"beta2_decay": 0.8}, "beta2_decay is 0.8"),
    ],
)
def test_wrong_settings_give_one_sentence(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        RULES[name]([nn.Parameter(torch.zeros(2, 2))], **settings)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_prediction_says_what_goes_over_the_wire_for_whole_matrices() -> None:
    from toolkit.estimate.predict import Case, Estimator

    for name, sends in (("AdEMAMix", False), ("Adafactor8", False), ("Muon8", True), ("NorMuon", True)):
        config = {"optimizer": {"type": name, "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 2}}
        settings = config | {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
        case = Case("qwen3-tiny", settings, 2, 1, 8, device="cpu", activations=Activations(), loss="plain")
        assert (Estimator().predict(case).sent > 0) == sends, name
