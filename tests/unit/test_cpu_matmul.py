"""bf16 products computed in fp32 on a CPU: right, bounded, below autograd, and as large as they are said to be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.errors import UserError
from toolkit.models import cpu_matmul

BF16 = torch.bfloat16


@pytest.fixture
def widening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products are computed in fp32, by tiles that small matrices have many of."""
    monkeypatch.setenv(cpu_matmul.VARIABLE, "fp32")
    monkeypatch.setattr(cpu_matmul, "EDGE", 32)
    monkeypatch.setattr(cpu_matmul, "TRANSIENT", 3 * 32 * 32 * 4)
    assert cpu_matmul.install()
    yield
    cpu_matmul.uninstall()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(BF16)


def close(result: Tensor, exact: Tensor) -> None:
    """`result` is `exact`, float64, but for the last place of bf16 and what fp32 sums lose."""
    assert result.dtype == BF16 and result.shape == exact.shape
    error = (result.double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-5 * exact.abs().max()).all(), error.max()


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (32, 64, 32), (70, 100, 45), (5, 200, 3), (4, 0, 3), (0, 4, 3)])
@pytest.mark.usefixtures("widening")
def test_products_are_those_of_float64(m: int, k: int, n: int) -> None:
    a, b, base, bias = draw(m, k), draw(k, n), draw(m, n), draw(n)
    exact = a.double() @ b.double()
    if exact.numel() == 0:
        assert (a @ b).shape == exact.shape
        return
    close(a @ b, exact)
    close(draw(k, m).t() @ draw(n, k).t(), draw(k, m).t().double() @ draw(n, k).t().double())
    close(torch.addmm(bias, a, b), exact + bias.double())
    close(torch.addmm(base, a, b, beta=0.5, alpha=-2.0), 0.5 * base.double() - 2.0 * exact)
    close(torch.addmm(torch.full_like(base, torch.nan), a, b, beta=0), exact)
    close(base.clone().addmm_(a, b), base.double() + exact)
    out = torch.empty(0, dtype=BF16)
    close(torch.mm(a, b, out=out), exact)
    close(torch.addmm(bias, a, b, out=torch.empty(m, n, dtype=BF16)), exact + bias.double())
    close(F.linear(a, b.t().contiguous(), bias), exact + bias.double())


@pytest.mark.parametrize(("batch", "m", "k", "n"), [(1, 8, 8, 8), (7, 16, 8, 24), (3, 40, 50, 33), (2, 3, 0, 4)])
@pytest.mark.usefixtures("widening")
def test_batches_of_products_are_those_of_float64(batch: int, m: int, k: int, n: int) -> None:
    a, b, base = draw(batch, m, k), draw(batch, k, n), draw(batch, m, n)
    exact = a.double() @ b.double()
    close(a @ b, exact)
    close(torch.bmm(a, b, out=torch.empty(batch, m, n, dtype=BF16)), exact)
    close(torch.baddbmm(base, a, b, beta=2.0, alpha=0.5), 2.0 * base.double() + 0.5 * exact)
    close(base.clone().baddbmm_(a, b), base.double() + exact)
    close(torch.addbmm(base[0], a, b), base[0].double() + exact.sum(0))
    close(torch.einsum("bmk,bkn->bnm", a, b), exact.transpose(1, 2))


@pytest.mark.usefixtures("widening")
def test_a_result_may_replace_an_operand() -> None:
    a, b = draw(40, 40), draw(40, 40)
    exact = a.double() @ b.double()
    close(torch.mm(a, b, out=a), exact)


@pytest.mark.usefixtures("widening")
def test_other_types_and_wrong_shapes_are_torchs_own() -> None:
    a, b = draw(40, 50).float(), draw(50, 30).float()
    cpu_matmul.uninstall()
    own = a @ b
    cpu_matmul.install()
    assert torch.equal(a @ b, own)
    with pytest.raises(RuntimeError, match="same dtype"):
        draw(4, 4) @ draw(4, 4).float()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        draw(4, 5) @ draw(4, 5)


@pytest.mark.parametrize("shape", [(2, 4, 4, 24), (3, 6, 2, 9), (1, 1, 1, 70)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("widening")
def test_attention_is_that_of_float64(shape: tuple[int, int, int, int], masked: bool) -> None:
    sequences, heads, key_heads, length = shape
    width = 16
    base = [draw(sequences, length, n, width).transpose(1, 2) for n in (heads, key_heads, key_heads)]
    mask = None
    if masked:
        hidden = torch.ones(length, length).triu(1).bool()
        mask = torch.zeros(sequences, 1, length, length, dtype=BF16).masked_fill(hidden, -torch.inf)
    gradient = draw(sequences, heads, length, width)

    def attend(kind: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(kind).requires_grad_() for x in base]
        given = None if mask is None else mask.to(kind)
        out = F.scaled_dot_product_attention(
            *inputs, attn_mask=given, is_causal=not masked, enable_gqa=heads != key_heads
        )
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(kind))]

    found, exact = attend(BF16), attend(torch.float64)
    cpu_matmul.uninstall()
    own = attend(BF16)
    close(found[0], exact[0])
    for result, theirs, wanted in zip(found, own, exact, strict=True):
        assert result.dtype == BF16 and result.stride() == theirs.stride()
        # The backward pass starts from a rounded result of the forward pass, torch's own too.
        assert (result.double() - wanted).norm() < 1.05 * (theirs.double() - wanted).norm()


@pytest.mark.usefixtures("widening")
def test_autograd_keeps_bf16_and_gives_bf16() -> None:
    model = nn.Sequential(nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 40)).to(BF16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(draw(3, 20, 48)).square().mean()
    loss.backward()
    assert kept and {x.dtype for x in kept} == {BF16}
    wide = nn.Sequential(nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 40))
    wide.load_state_dict(model.state_dict())
    wide(draw(3, 20, 48).float()).square().mean().backward()
    for mine, exact in zip(model.parameters(), wide.parameters(), strict=True):
        assert mine.grad is not None and exact.grad is not None and mine.grad.dtype == BF16
        assert (mine.grad.float() - exact.grad).norm() < 0.02 * exact.grad.norm()


@pytest.mark.usefixtures("widening")
def test_experts_are_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped product of mixture-of-experts models ends in the products that are replaced."""
    seen = 0
    product = cpu_matmul._product

    def counted(*args: Any) -> None:
        nonlocal seen
        seen += 1
        product(*args)

    monkeypatch.setattr(cpu_matmul, "_product", counted)
    x, experts = draw(64, 48).requires_grad_(), draw(4, 48, 40).requires_grad_()
    ends = torch.tensor([10, 30, 30, 64], dtype=torch.int32)
    out = torch._grouped_mm(x, experts, offs=ends)
    starts = [0, *ends.tolist()]
    exact = torch.cat([x[a:b].double() @ w.double() for a, b, w in zip(starts, starts[1:], experts, strict=False)])
    close(out.detach(), exact.detach())
    forward = seen
    out.backward(draw(64, 40))
    assert forward >= 3 and seen > forward


def peak(call: Callable[[], Any]) -> int:
    """Most bytes allocated within `call`, what it returns included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
        del result
    held = largest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


@pytest.mark.parametrize("shape", [(20, 20, 20), (100, 300, 50), (2, 500, 2)])
@pytest.mark.usefixtures("widening")
def test_the_temporaries_are_as_large_as_predicted_and_bounded(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = draw(m, k), draw(k, n)
    sizes = cpu_matmul.workspace(torch.ops.aten.mm.default, (a, b))
    assert peak(lambda: a @ b) == 2 * m * n + 4 * sum(sizes)
    assert 4 * sum(sizes) <= cpu_matmul.TRANSIENT
    batch = (draw(6, m, k), draw(6, k, n))
    sizes = cpu_matmul.workspace(torch.ops.aten.bmm.default, batch)
    assert peak(lambda: torch.bmm(*batch)) == 12 * m * n + 4 * sum(sizes)
    assert 4 * sum(sizes) <= cpu_matmul.TRANSIENT


def test_operations_that_stay_torchs_own_have_no_temporaries() -> None:
    a = draw(4, 4)
    assert cpu_matmul.workspace(torch.ops.aten.mm.default, (a.float(), a.float())) == []
    assert cpu_matmul.workspace(torch.ops.aten.add.Tensor, (a, a)) == []


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("native", False), ("fp32", True)):
        monkeypatch.setenv(cpu_matmul.VARIABLE, value)
        assert cpu_matmul.computes_in_fp32() is expected
    monkeypatch.setenv(cpu_matmul.VARIABLE, "nativ")
    with pytest.raises(
        UserError, match=r"LEANSTATE_CPU_MATMUL is 'nativ', but must be one of auto, native, fp32.*native"
    ):
        cpu_matmul.computes_in_fp32()


def test_a_cpu_without_bf16_products_is_recognised() -> None:
    """oneDNN told to leave AVX-512 alone behaves as it does where there is none."""
    code = "from toolkit.models import cpu_matmul as c; import torch; print(c.computes_in_fp32())"
    poor = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    poor.pop(cpu_matmul.VARIABLE, None)
    run = subprocess.run([sys.executable, "-c", code], env=poor, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"
