"""The optimizer class: layouts, formats, groups, saving, compiled against eager, and training quality."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.errors import UserError
from toolkit.optim import AMCS, RULES, SOAM, Rule, State, as_optimizer, check_settings, find_rule
from toolkit.optim.step import step_function
from toolkit.state.codecs import BLOCK, Root8, Signed8

SIZES = [(7,), (64, 64), (2, 256), (300, 1), (1, 1000), (33, 100), (3, 256), (513, 3)]


def train(optimizer_class: Any, steps: int = 10, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    parameters = [nn.Parameter(torch.randn(*size).to(dtype)) for size in SIZES]
    optimizer = optimizer_class(parameters, **kwargs)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn_like(p) * 1e-2
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "extra"), [(AMCS, {"total_steps": 10}), (SOAM, {})])
def test_eager_gives_the_compiled_numbers(rule: Any, extra: dict[str, Any], dtype: torch.dtype) -> None:
    compiled, fast = train(rule, dtype=dtype, **extra)
    eager, slow = train(rule, dtype=dtype, compile=False, **extra)
    function = step_function(
        rule.rule, tuple(rule.rule(**extra).scalars(1)), tuple(fast.codecs(fast.param_groups[0]).values())
    )
    assert function.fallback_reason is None, "the compiled step did run"
    # Eager square roots come from a vector library that may be off in the last place; all else is equal. That
    # moves a value across a rounding boundary now and then.
    for a, b in zip(compiled, eager, strict=True):
        apart = (a.detach() - b.detach()).float().norm() / a.detach().float().norm()
        assert apart < (1e-3 if dtype == torch.bfloat16 else 1e-5)
        for key, value in fast.state[a].items():
            if value.__class__ is torch.Tensor and value.dtype in (torch.int8, torch.uint8):
                assert (value != slow.state[b][key]).float().mean() < 0.01, key


def test_one_graph_serves_every_size() -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # fp32 state for all, so that matrices and vectors share one function.
    _, optimizer = train(SOAM, steps=2, state_format="fp32")
    assert len({-(-p.numel() // BLOCK) for group in optimizer.param_groups for p in group["params"]}) > 5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


def test_the_compiled_step_keeps_no_full_size_temporaries() -> None:
    p = nn.Parameter(torch.randn(1024, 1024))
    p.grad = torch.randn_like(p)
    optimizer = AMCS([p], alpha=0.5)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    allocated = sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0)
    assert allocated < 0.2 * p.numel(), "bytes: a value or two per block and state, never one per element"


def test_eager_fallback_says_why(caplog: pytest.LogCaptureFixture) -> None:
    class PrintingRule(Rule):
        """A rule the compiler cannot take: it calls Python that has no graph."""

        states = (State("m"),)
        lr: float = 0.1

        def scalars(self, t: int) -> dict[str, float]:
            return {"lr": self.lr}

        @staticmethod
        def update(theta: Any, g: Any, *states: Any, **s: Any) -> Any:
            inspect.currentframe()
            torch._dynamo.graph_break()
            return theta - s["lr"] * g, states[0] + g

    try:
        optimizer_class = as_optimizer(PrintingRule)
        p = nn.Parameter(torch.ones(40, 40))
        p.grad = torch.ones(40, 40)
        with caplog.at_level(logging.WARNING, "toolkit"):
            optimizer_class([p]).step()
    finally:
        RULES.pop("Printing")
    assert "runs eagerly" in caplog.text and "torch.compile failed" in caplog.text
    torch.testing.assert_close(p.detach(), torch.full((40, 40), 0.9))


def test_any_layout_of_memory() -> None:
    torch.manual_seed(0)
    base = torch.randn(48, 64)
    plain, transposed = nn.Parameter(base.clone()), nn.Parameter(base.t().contiguous().t())
    assert not transposed.is_contiguous()
    g = torch.randn(48, 64)
    for p in (plain, transposed):
        p.grad = g.clone() if p is plain else g.t().contiguous().t()
        SOAM([p]).step()
    torch.testing.assert_close(plain.detach(), transposed.detach())


def test_state_is_one_byte_per_element_and_a_scale_per_block() -> None:
    p = nn.Parameter(torch.zeros(512, 512))
    p.grad = torch.ones_like(p)
    optimizer = AMCS([p], alpha=0.5)
    optimizer.step()
    per_element = {key: value / p.numel() for key, value in optimizer.state_bytes().items()}
    assert per_element == {key: 1 + 4 / BLOCK for key in ("m_fast", "m_slow", "v")}
    assert optimizer.state[p]["m_fast"].dtype == torch.int8
    assert optimizer.state[p]["v"].dtype == torch.uint8


def test_formats_per_state_and_fp32_for_one_dimension() -> None:
    matrix, vector = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(64))
    optimizer = AMCS([matrix, vector], alpha=0.5, state_format={"v": "fp32"})
    formats = [group["state_format"] for group in optimizer.param_groups]
    assert formats == [
        {"m_fast": "8bit", "m_slow": "8bit", "v": "fp32"},
        dict.fromkeys(("m_fast", "m_slow", "v"), "fp32"),
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1], "bare tensors decay alike"


def test_state_dict_round_trip_continues_bit_for_bit() -> None:
    parameters, optimizer = train(AMCS, total_steps=20)
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    twin = AMCS(twins, total_steps=20)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.state[twins[1]]["m_fast"].dtype == torch.int8, "torch's own loading casts codes to float"
    for both in (parameters, twins):
        torch.manual_seed(11)
        for p in both:
            p.grad = torch.randn_like(p)
    optimizer.step()
    twin.step()
    for a, b in zip(parameters, twins, strict=True):
        assert torch.equal(a, b)


def test_copies_and_pickles_step_alike() -> None:
    parameters, optimizer = train(SOAM, steps=2, compile=False)
    twin = pickle.loads(pickle.dumps((parameters, optimizer)))
    copied = copy.deepcopy((parameters, optimizer))
    for tensors, each in ((parameters, optimizer), twin, copied):
        for p in tensors:
            p.grad = torch.full_like(p, 1e-2)
        each.step()
    for a, b, c in zip(parameters, twin[0], copied[0], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_hyper_parameter_given_twice_is_refused() -> None:
    with pytest.raises(TypeError, match="twice"):
        SOAM([nn.Parameter(torch.ones(2, 2))], 1e-3, lr=2e-3)


def test_loading_another_format_is_refused() -> None:
    _, optimizer = train(SOAM, steps=1)
    _, other = train(SOAM, steps=1, state_format="fp32")
    with pytest.raises(ValueError, match="state_format"):
        optimizer.load_state_dict(other.state_dict())


def test_scheduler_that_overwrites_lr_keeps_component_rates() -> None:
    p = nn.Parameter(torch.zeros(16, 16))
    optimizer = AMCS([{"params": [p], "component": "attention"}], lr=1e-3, alpha=1.0, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 5e-4
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((16, 16), -1.2 * 5e-4), rtol=1e-2, atol=0.0)


def test_torch_schedulers_and_closure_work() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = SOAM([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 16.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_betas_that_a_scheduler_broke_are_named() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = AMCS([p], alpha=0.5)
    optimizer.param_groups[0]["betas"] = (0.9, 0.95)  # OneCycle with cycle_momentum does this
    p.grad = torch.ones_like(p)
    with pytest.raises(UserError, match="betas"):
        optimizer.step()


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="sparse"):
        SOAM(embedding.parameters()).step()


def test_parameters_without_gradient_are_left_alone() -> None:
    p, frozen = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones_like(p)
    optimizer = SOAM([p, frozen])
    optimizer.step()
    assert torch.equal(frozen.detach(), torch.ones(4, 4))
    assert frozen not in optimizer.state


def test_signature_names_every_hyper_parameter() -> None:
    parameters = inspect.signature(AMCS).parameters
    assert list(parameters)[:6] == ["params", "lr", "betas", "eps", "weight_decay", "total_steps"]
    assert parameters["lr"].default == 6e-4
    assert inspect.signature(SOAM).parameters["lr"].default == 8e-3
    assert SOAM([nn.Parameter(torch.ones(2, 2))], 1e-3).param_groups[0]["lr"] == 1e-3


def test_names_resolve_in_any_case() -> None:
    assert find_rule("amcs") is AMCS
    assert find_rule("AdamW") is None
    check_settings("SOAM", {"lr": "auto", "betas": [0.9, 0.95]})
    with pytest.raises(UserError, match="Did you mean 'lr'"):
        check_settings("SOAM", {"lrr": 1e-3})


def test_the_documented_rule_is_the_tested_one() -> None:
    """docs/extending.md shows the very file that the multi-rank tests load."""
    root = Path(__file__).parents[2]
    code = (root / "tests" / "distributed" / "lion.py").read_text()
    body = code[code.index("from torch import Tensor") :]
    assert body in (root / "docs" / "extending.md").read_text()
    rule = body[body.index("class LionRule") : body.index("Lion = ")].rstrip()
    assert len(rule.splitlines()) < 30


def test_codecs_follow_the_sign() -> None:
    _, optimizer = train(AMCS, steps=1, alpha=0.5)
    codecs = optimizer.codecs(optimizer.param_groups[0])
    assert (codecs["m_fast"], codecs["v"]) == (Signed8, Root8)
