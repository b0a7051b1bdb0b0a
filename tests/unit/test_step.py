"""The step on blocks: compiled against eager, against float64, in bf16 against fp32, and what memory it takes."""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from fp32_weights import whole
from torch import Tensor, nn

import toolkit.optim.kernel as step_module
from toolkit.errors import UserError
from toolkit.optim import AMCS, RULES, SOAM, AMCSRule, NonNegative, Rule, State, as_optimizer, inductor
from toolkit.optim.kernel import StepFunction, step_function
from toolkit.state.codecs import BLOCK, Root, Signed, decode_blocks
from toolkit.state.layout import layout_of
from toolkit.state.remainders import WEIGHTS

SIZES = [(7,), (64, 64), (2, 256), (300, 1), (1, 1000), (33, 100), (3, 256), (513, 3)]
FORMAT = [state.name for state in AMCSRule.states]
BF16_4 = {"state_format": "compact", "weights": "bf16+4"}


def train(
    optimizer_class: Any, steps: int = 10, dtype: torch.dtype = torch.float32, size: float = 1e-2, **kwargs: Any
) -> tuple[list[nn.Parameter], Any]:
    """Parameters that start as bf16 numbers, given bf16 gradients, so that every `dtype` starts and gets the same."""
    generator = torch.Generator().manual_seed(3)

    def draw(shape: Any, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16).to(dtype)

    parameters = [nn.Parameter(draw(shape)) for shape in SIZES]
    optimizer = optimizer_class(parameters, **kwargs)
    for _ in range(steps):
        for p in parameters:
            p.grad = draw(p.shape, size)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(
    ("rule", "dtype", "settings"),
    [
        (AMCS, torch.float32, {"total_steps": 10}),
        (AMCS, torch.bfloat16, {"total_steps": 10}),
        (AMCS, torch.bfloat16, {"total_steps": 10, **BF16_4}),
        (SOAM, torch.float32, {}),
        (SOAM, torch.bfloat16, {"state_format": "minimal", "weights": "bf16+4"}),
        (SOAM, torch.bfloat16, {"weights": "bf16"}),
    ],
)
def test_eager_gives_the_compiled_numbers(rule: Any, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    compiled, fast = train(rule, dtype=dtype, **settings)
    eager, slow = train(rule, dtype=dtype, compile=False, **settings)
    for group in fast.param_groups:
        hyper = {key: value for key, value in settings.items() if key in rule.rule.model_fields}
        names = tuple(rule.rule(**hyper).scalars(1))
        assert step_function(rule.rule, names, fast.layout(group, dtype)).fallback_reason is None, "it was compiled"
    # Eager square roots come from a vector library that may be off in the last place; all else is equal. That
    # moves a value across a rounding boundary now and then.
    for a, b in zip(compiled, eager, strict=True):
        apart = (whole(fast, a) - whole(slow, b)).norm() / whole(fast, a).norm()
        assert apart < (1e-4 if dtype == torch.bfloat16 else 1e-5)
        for key, value in fast.state[a].items():
            if isinstance(value, Tensor) and value.dtype in (torch.int8, torch.uint8) and key != "remainder.low":
                assert (value != slow.state[b][key]).float().mean() < 0.02, key


def test_one_compilation_serves_every_size_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, and views that begin anywhere: with 4-bit codes halves of blocks are views of their own."""
    compiled: list[Any] = []

    def compile_blocks(*args: Any) -> Any:
        compiled.append(args)
        return inductor.compile_blocks(*args)

    monkeypatch.setattr(step_module, "compile_blocks", compile_blocks)
    step_function.cache_clear()
    _, optimizer = train(SOAM, steps=2, dtype=torch.bfloat16, **BF16_4)
    p = nn.Parameter(torch.randn(40, BLOCK).bfloat16())
    optimizer.add_param_group({"params": [p]})
    for start, stop in ((0, 20), (3, 20), (20, 40), (1, 4), (38, 40)):
        stream = optimizer.begin(optimizer.param_groups[-1], p).stream(start * BLOCK, stop * BLOCK, first_block=start)
        stream.add(torch.randn((stop - start) * BLOCK).bfloat16(), torch.ones(()))
        stream.finish(torch.ones(()))
    blocks = {-(-p.numel() // BLOCK) for group in optimizer.param_groups for p in group["params"]}
    assert len(blocks) > 5 and len(compiled) == 2, "matrices, and vectors with fp32 state"


def test_the_compiled_step_keeps_none_of_the_tensors_it_was_compiled_for() -> None:
    step_function.cache_clear()
    p = nn.Parameter(torch.randn(40, BLOCK))
    p.grad = torch.randn_like(p)
    kept = weakref.ref(p.grad.untyped_storage())
    optimizer = SOAM([p])
    optimizer.step()
    p.grad = None
    gc.collect()
    assert kept() is None


def test_a_call_never_needs_64_bit_indices() -> None:
    """Of a tensor of 2^31 + 512 elements each block is stepped once, and knows its number."""
    function = StepFunction(AMCSRule, ("lr",), layout_of(AMCSRule.states, dict.fromkeys(FORMAT, "8bit"), "bf16+8"))
    blocks, calls = (2**31 + 512) // BLOCK, []
    theta = torch.empty(blocks, BLOCK, dtype=torch.bfloat16, device="meta")
    parts = [torch.empty(blocks, spec.per_block, dtype=spec.dtype, device="meta") for _, spec in function.layout.specs]
    function._compiled[theta.device, theta.dtype, theta.dtype] = lambda *inputs: calls.append(inputs)
    phases = []
    function._phase = lambda theta, rounding: phases.append(rounding)  # type: ignore[method-assign, assignment, func-returns-value]
    function(True, theta, theta, torch.ones(1), torch.ones(()), parts, (7, 3, 11))
    rows = [inputs[0][0].shape[0] for inputs in calls]
    assert sum(rows) == blocks and max(rows) * BLOCK < 2**31 and min(rows) > 1
    assert all(
        half.shape[0] == n for inputs, n in zip(calls, rows, strict=True) for part in inputs[:-3] for half in part
    )
    starts = [sum(rows[:number]) for number in range(len(rows))]
    assert phases == [(7, 3, 11 + start) for start in starts]
    offsets = [inputs[2][0].storage_offset() for inputs in calls]
    assert offsets == [start * BLOCK for start in starts]


@pytest.mark.parametrize(("dtype", "settings"), [(torch.float32, {}), (torch.bfloat16, BF16_4)])
def test_the_compiled_step_keeps_no_full_size_temporaries(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    p = nn.Parameter(torch.randn(1024, 1024).to(dtype))
    p.grad = torch.randn_like(p)
    optimizer = AMCS([p], alpha=0.5, **settings)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    allocated = sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0)
    assert allocated < 0.2 * p.numel(), "bytes: a value or two per block and state, never one per element"


def test_eager_fallback_says_why(caplog: pytest.LogCaptureFixture) -> None:
    class PrintingRule(Rule):
        """A rule the compiler cannot take: it asks for a value."""

        states = (State("m"),)
        lr: float = 0.1

        def scalars(self, t: int) -> dict[str, float]:
            return {"lr": self.lr}

        @staticmethod
        def update(theta: Any, g: Any, *states: Any, **s: Any) -> Any:
            assert bool((theta == theta).all())
            return theta - s["lr"] * g, states[0] + g

    try:
        optimizer_class = as_optimizer(PrintingRule)
        p = nn.Parameter(torch.ones(40, 40))
        p.grad = torch.ones(40, 40)
        with caplog.at_level(logging.WARNING, "toolkit"):
            optimizer_class([p]).step()
    finally:
        RULES.pop("Printing")
    assert "runs eagerly" in caplog.text and "compiling it failed" in caplog.text
    torch.testing.assert_close(p.detach(), torch.full((40, 40), 0.9))


def test_running_out_of_memory_is_no_reason_to_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room for the kernel")

    monkeypatch.setattr(step_module, "compile_blocks", exhausted)
    step_function.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        train(SOAM, steps=1)
    step_function.cache_clear()


def decoded(optimizer: Any, p: nn.Parameter, second: Any) -> dict[str, np.ndarray]:
    """The states of AMCS with a residual, in float64 [blocks, BLOCK], and the scales of their codes [blocks, 1]."""
    held = optimizer.state[p]
    parts = {name: (held[name], held[f"{name}.scale"]) for name in ("m_fast", "m_slow", "v")}
    m_slow = decode_blocks(Signed(8), *parts["m_slow"])
    values = {
        "m_fast": m_slow.double() + decode_blocks(Signed(4, relative=True), *parts["m_fast"]).double(),
        "m_slow": m_slow,
        "v": decode_blocks(second, *parts["v"]),
        **{f"{name}.scale": scale for name, (_, scale) in parts.items()},
    }
    return {name: value.double().numpy() for name, value in values.items()}


@pytest.mark.parametrize(("state_format", "second", "largest"), [("compact", Root(8), 255), ("minimal", Root(4), 15)])
def test_a_step_continues_from_what_was_stored(state_format: str, second: Any, largest: int) -> None:
    """m_fast is m_slow and a residual: decoded, updated by the equations, and coded to within a code."""
    torch.manual_seed(0)
    b_f, b_s, b_v, lr, eps, decay, alpha = 0.9, 0.95, 0.99, 1e-2, 1e-8, 0.1, 0.7
    p = nn.Parameter(torch.randn(16, BLOCK))
    settings = {"alpha": alpha, "lr": lr, "betas": (b_f, b_s, b_v), "eps": eps, "weight_decay": decay}
    optimizer = AMCS([p], state_format=state_format, compile=False, **settings)
    drift = torch.randn(16, BLOCK)
    for t in range(1, 9):
        p.grad = drift + torch.randn(16, BLOCK)
        g, theta = p.grad.double().numpy(), p.detach().double().numpy()
        old = decoded(optimizer, p, second) if t > 1 else dict.fromkeys(("m_fast", "m_slow", "v"), np.zeros_like(g))
        m_fast = b_f * old["m_fast"] + (1 - b_f) * g
        m_slow = b_s * old["m_slow"] + (1 - b_s) * g
        v = b_v * old["v"] + (1 - b_v) * g**2
        m = alpha * m_fast / (1 - b_f**t) + (1 - alpha) * m_slow / (1 - b_s**t)
        theta = theta - lr * decay * theta - lr * m / (np.sqrt(v / (1 - b_v**t)) + eps)
        optimizer.step()
        np.testing.assert_allclose(p.detach().double().numpy(), theta, rtol=1e-5, atol=1e-6)
        new = decoded(optimizer, p, second)

        def apart(got: np.ndarray, want: np.ndarray, scale: np.ndarray) -> float:
            return float(np.abs(np.sqrt(np.abs(got) / scale) - np.sqrt(np.abs(want) / scale)).max())

        assert apart(new["m_slow"], m_slow, new["m_slow.scale"]) < 1.001 / 127
        assert apart(new["m_fast"] - new["m_slow"], m_fast - m_slow, new["m_fast.scale"]) < 1.001 / 7
        assert np.abs((new["v"] ** 0.25 - v**0.25) / new["v.scale"]).max() < 1.001 / largest


@pytest.mark.parametrize("state_format", ["8bit", "compact"])
@pytest.mark.parametrize(("rule", "extra"), [(AMCS, {"total_steps": 50}), (SOAM, {})])
def test_bf16_with_16_bits_is_fp32(rule: Any, extra: dict[str, Any], state_format: str, one_thread: None) -> None:
    """Bit for bit, weights and states, for as long as one trains."""
    settings = {"lr": 1e-2, "compile": False, "state_format": state_format, **extra}
    exact, master = train(rule, 50, torch.float32, **settings)
    pairs, optimizer = train(rule, 50, torch.bfloat16, weights="bf16+16", **settings)
    for a, b in zip(exact, pairs, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(whole(optimizer, b), a.detach())
        assert torch.equal(b.detach(), a.detach().to(torch.bfloat16)), "no ties here"
        for key, value in master.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer.state[b][key])), key


# The step is 1e-4 where the last bit of a bf16 weight near 1 is 4e-3, so that rounding to nearest would move nothing.
SMALL = {"lr": 1e-4, "compile": False, "total_steps": 100}
exact_steps = functools.cache(lambda steps: train(AMCS, steps, torch.float32, **SMALL))
BOUNDS = [("bf16+8", 5e-2, 0.02), ("bf16+4", 0.6, 0.02), ("bf16", 3.0, 0.07)]


@pytest.mark.parametrize(("weights", "most", "mean"), BOUNDS)
def test_fewer_bits_stay_close_to_fp32(weights: str, most: float, mean: float, one_thread: None) -> None:
    (exact, master), (start, _) = exact_steps(100), exact_steps(0)
    pairs, optimizer = train(AMCS, 100, torch.bfloat16, weights=weights, **SMALL)
    moved = torch.cat([(a - s).detach().flatten() for a, s in zip(exact, start, strict=True) if a.dim() > 1])
    errors = [whole(optimizer, b) - whole(master, a) for a, b in zip(exact, pairs, strict=True)]
    error = torch.cat([e.flatten() for e in errors if e.dim() > 1])
    assert error.norm() < most * moved.norm()
    # Of "bf16" the mean of coins tossed apart would be 0.022 off, rms.
    assert error.mean().abs() < mean * moved.abs().mean(), "right on average"
    assert torch.equal(whole(optimizer, pairs[0]), whole(master, exact[0])), "1-D tensors keep all 16 bits"


def test_seed_and_step_change_the_rounding() -> None:
    results = []
    for seed in (0, 0, 1):
        pairs, optimizer = train(SOAM, 3, torch.bfloat16, lr=1e-4, weights="bf16+4", seed=seed, compile=False)
        results.append(torch.cat([whole(optimizer, p).flatten() for p in pairs]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_weights_that_were_replaced_lose_their_remainder() -> None:
    pairs, optimizer = train(SOAM, 3, torch.bfloat16, lr=1e-4, weights="bf16+16", compile=False)
    assert optimizer.holds_weights()
    assert any(not torch.equal(whole(optimizer, p), p.detach().float()) for p in pairs)
    optimizer.forget_remainders()
    assert all(torch.equal(whole(optimizer, p), p.detach().float()) for p in pairs)
    assert any(optimizer.state[p]["m"].count_nonzero() for p in pairs), "states stay"


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="sparse"):
        SOAM(embedding.parameters()).step()


SPIKES = [2.0**62, 1e19, 2e19, 1e25, -1e30, 1.7e38, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]


@pytest.mark.parametrize(
    ("rule", "extra"),
    [(AMCS, {"total_steps": 9}), (AMCS, {"alpha": 0.5, "mode": "single"}), (SOAM, {}), (SOAM, {"eps": 0.0})],
)
@pytest.mark.parametrize("state_format", ["fp32", "8bit", "4bit", "compact", "minimal"])
@pytest.mark.parametrize("weights", ["fp32", *WEIGHTS])
def test_any_finite_gradient_leaves_weights_finite(
    rule: Any, extra: dict[str, Any], state_format: str, weights: str, one_thread: None
) -> None:
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    p = nn.Parameter(torch.linspace(-1, 1, 2 * BLOCK).view(2, BLOCK).to(dtype))
    settings = {"state_format": state_format, "weights": weights, "weight_decay": 0.0, "compile": False} | extra
    optimizer = rule([p], lr=1e-2, **settings)
    for step in range(24):
        before = p.detach().float()
        p.grad = torch.full_like(p, 1e-3)
        spike = SPIKES[step % len(SPIKES)]
        p.grad[0, step] = spike
        assert p.grad.isfinite().all() or dtype == torch.bfloat16
        p.grad[~p.grad.isfinite()] = torch.finfo(dtype).max
        optimizer.step()
        assert p.isfinite().all(), (step, spike)
        assert (p - before).abs().max() < 0.2, "and no weight leaps"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_huge_element_of_a_gradient_counts_as_none(compiled: bool) -> None:
    p, same = (nn.Parameter(torch.zeros(4, BLOCK)) for _ in range(2))
    huge, usual = (SOAM([q], lr=1e-2, state_format="fp32", compile=compiled) for q in (p, same))
    signs = torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(0)).sign()
    p.grad, same.grad = signs * 1e3, signs * 1e3
    p.grad[1, :7], same.grad[1, :7] = 1e30, 0.0
    p.grad[2, 0], same.grad[2, 0] = 2.0**63, 2.0**63  # still counts as it is
    huge.step()
    usual.step()
    assert torch.equal(p, same) and (p[2] != 0).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_in_a_gradient_is_seen_in_the_weights(bad: float, compiled: bool) -> None:
    p = nn.Parameter(torch.zeros(4, BLOCK))
    optimizer = SOAM([p], compile=compiled)
    p.grad = torch.ones_like(p)
    p.grad[1, 2] = bad
    optimizer.step()
    assert p[1, 2].isnan() and p[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("rule", [AMCS, SOAM])
@pytest.mark.parametrize("compiled", [False, True])
def test_fp64_weights_keep_their_digits(rule: Any, compiled: bool) -> None:
    extra: dict[str, Any] = {"total_steps": 5} if rule is AMCS else {}
    start = torch.randn(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    still, moves = (nn.Parameter(start.clone()) for _ in range(2))
    optimizer = rule([still, moves], lr=1e-3, weight_decay=0.0, state_format="fp32", compile=compiled, **extra)
    same = nn.Parameter(start.float())
    narrow = rule([same], lr=1e-3, weight_decay=0.0, state_format="fp32", compile=compiled, **extra)
    for step in range(3):
        still.grad = torch.zeros_like(still)
        moves.grad = torch.randn(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        same.grad = moves.grad.float()
        optimizer.step()
        narrow.step()
    assert torch.equal(still.detach(), start), "a gradient of zero moves nothing"
    torch.testing.assert_close((moves - start).detach(), same.detach().double() - start, rtol=1e-3, atol=3e-7)
    assert not torch.equal(moves.detach(), moves.detach().float().double())


class ShiftRule(Rule):
    """Hands on what it is given: the gradient, the one before it, and the weights before this step."""

    states = (State("last"), State("before"), State("weights"))

    lr: NonNegative = 1e-2

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr}

    @staticmethod
    def update(
        theta: Tensor, g: Tensor, last: Tensor, before: Tensor, weights: Tensor, **s: Tensor
    ) -> tuple[Tensor, ...]:
        return theta - s["lr"] * (g + last + before + weights), g, last, theta


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(7,), (16, 32)])
def test_a_state_that_is_handed_on_is_the_one_before_the_step(shape: tuple[int, ...], compiled: bool) -> None:
    p = nn.Parameter(torch.ones(shape))
    try:
        optimizer: Any = as_optimizer(ShiftRule)([p], lr=0.5, state_format="fp32", compile=compiled)
    finally:
        RULES.pop("Shift")
    want, held = torch.ones(shape), [torch.zeros(shape)] * 3
    for step in range(4):
        p.grad = g = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        new = want - 0.5 * (g + held[0] + held[1] + held[2])
        want, held = new, [g, held[0], want]
        assert torch.allclose(p.detach(), want, atol=1e-5)
