"""What a CUDA device must show: `pytest tests/gpu -m gpu`.

What a CPU can compute, too, runs there at toy size: so these tests are known to work before a GPU is at hand.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from fp32_weights import whole
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.checkpoint.files import Staging
from toolkit.models.loss import linear_cross_entropy
from toolkit.models.offload import HostActivations
from toolkit.optim import AMCS, SOAM
from toolkit.zero.gradients import HostCopy, squared_norm

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


def test_the_copy_for_a_checkpoint_goes_through_bounded_pinned_memory(device: str) -> None:
    staging = Staging(1 << 20, pin=device == "cuda")
    tensors = [torch.randn(size, device=device) for size in (0, 1, 1000, (1 << 18) + 3, 5 << 18)]
    tensors.append(torch.randn(300, 70, device=device).t())
    made = [staging.copy(tensor) for tensor in tensors]
    expected = [tensor.to("cpu", copy=True) for tensor in tensors]
    staging.finish()
    for tensor in tensors:
        tensor.zero_()
    assert all(torch.equal(a, b) and not a.is_pinned() for a, b in zip(made, expected, strict=True))


# In bf16 a value that falls to the other side of a threshold moves by a whole code, of 4 bits by much.
CASES = [
    (torch.float32, {}, 2e-3),
    (torch.bfloat16, {"weights": "bf16+8"}, 2e-2),
    (torch.bfloat16, {"state_format": "compact", "weights": "bf16+4"}, 3e-2),
]
RULES = [(AMCS, {"total_steps": 20}), (SOAM, {})]


@pytest.mark.parametrize(("dtype", "settings", "most"), CASES)
@pytest.mark.parametrize(("rule", "extra"), RULES)
def test_the_device_gives_the_numbers_of_the_eager_step_on_a_cpu(
    device: str, rule: Any, extra: dict[str, Any], dtype: torch.dtype, settings: dict[str, Any], most: float
) -> None:
    moved = list[Tensor]()
    for place, compiled in (("cpu", False), (device, True)):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(300, 257, generator=generator).to(dtype)
        p = nn.Parameter(start.to(place, copy=True))
        optimizer = rule([p], compile=compiled, **settings, **extra)
        for _ in range(10):
            p.grad = (torch.randn(300, 257, generator=generator) * 1e-2).to(dtype).to(place)
            optimizer.step()
        moved.append(whole(optimizer, p).cpu() - start.float())
    error = (moved[1] - moved[0]).norm() / moved[0].norm()
    assert error < most, error


@pytest.mark.parametrize(("dtype", "settings", "most"), CASES)
def test_pieces_give_what_the_whole_gives(
    device: str, dtype: torch.dtype, settings: dict[str, Any], most: float
) -> None:
    """Pieces and scales that begin anywhere in memory, where the compiler counts on aligned addresses."""
    numel, one = 432_741, torch.ones((), device=device)
    results = []
    for sizes in ([numel], [1, 255, 256, 257, 65_535, 65_537, 200_000, numel]):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(1, numel, generator=generator).to(dtype).to(device))
        optimizer = AMCS([p], alpha=0.7, **settings)
        for _ in range(2):
            gradient = torch.randn(numel, generator=generator).to(dtype).to(device)
            begun = optimizer.begin(optimizer.param_groups[0], p)
            assert begun is not None
            stream, start = begun.stream(first_block=0), 0
            for size in sizes:
                stream.add(gradient[start : start + size], one)
                start += size
            stream.finish(one)
        results.append({"weight": p.detach()} | optimizer.state[p])
    for key, value in results[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(results[1][key])), key


@pytest.mark.parametrize("device", [CUDA], indirect=True)
@pytest.mark.parametrize(("dtype", "settings", "most"), CASES)
@pytest.mark.parametrize(("rule", "extra"), RULES)
def test_the_step_keeps_no_full_size_temporaries(
    device: str, rule: Any, extra: dict[str, Any], dtype: torch.dtype, settings: dict[str, Any], most: float
) -> None:
    p = nn.Parameter(torch.randn(4096, 4096, device=device, dtype=dtype))
    p.grad = torch.randn_like(p)
    optimizer = rule([p], **settings, **extra)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 0.1 * p.numel(), "bytes per element"


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 3e-3), (torch.float16, 1e-3), (torch.float32, 1e-4)])
def test_gradients_of_the_head_are_rounded_once(device: str, dtype: torch.dtype, most: float) -> None:
    """Against float64 on the same operands, 134M's shapes, eight chunks of the vocabulary; and the same bits twice."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, vocabulary, width = (4096, 32_000, 768) if device == "cuda" else (64, 2_000, 96)
    weight = torch.randn(vocabulary, width, device=device, generator=generator) * 0.05
    targets = torch.randint(0, vocabulary, (tokens,), device=device, generator=generator)
    hidden = torch.randn(tokens, width, device=device, generator=generator) + 10 * weight[targets]
    found = []
    for _ in range(2):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        loss = linear_cross_entropy(leaves[0], leaves[1], targets)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in leaves if x.grad is not None)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    loss, *gradients = found[0]
    exact = [x.to(dtype).double().requires_grad_() for x in (hidden, weight)]
    wanted = F.cross_entropy(exact[0] @ exact[1].t(), targets)
    wanted.backward()
    assert abs(loss / wanted - 1) < 1e-5
    for gradient, leaf in zip(gradients, exact, strict=True):
        assert leaf.grad is not None
        assert (gradient - leaf.grad).norm() / leaf.grad.norm() < most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_of_many_pieces_is_that_of_float64_and_arrives_on_the_host(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randn(n, generator=generator).to(dtype) for n in (1, 255, 4_096, 70_001, 1_000_003)]
    exact = sum(float(piece.double().square().sum()) for piece in pieces)
    total = HostCopy(squared_norm([piece.to(device) for piece in pieces], device)).wait()
    assert total.device.type == "cpu" and total.dtype == torch.float64
    assert float(total) == pytest.approx(exact, rel=1e-5)
    on_both = squared_norm([pieces[0].to(device), *pieces[1:]], device)
    assert float(on_both) == pytest.approx(exact, rel=1e-5)
    pieces[2][7] = float("inf")
    assert not torch.isfinite(HostCopy(squared_norm([piece.to(device) for piece in pieces], device)).wait())


def test_activations_on_the_host_change_no_bit_and_leave_two_on_the_device(device: str) -> None:
    """The host runs ahead of the device, and memory that is let go is used again at once."""
    blocks, tokens, width = (12, 8192, 1024) if device == "cuda" else (5, 2048, 256)
    size = tokens * width * 2
    weights = [torch.randn(width, width, device=device, dtype=torch.bfloat16) / width**0.5 for _ in range(blocks)]
    given = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    allocated = torch.cuda.memory_allocated if device == "cuda" else lambda: 0

    def run(checkpoint: Any) -> tuple[Tensor, list[Tensor], int]:
        leaves = [weight.clone().requires_grad_() for weight in weights]
        start = allocated()
        x = given.clone().requires_grad_()
        for leaf in leaves:
            x = checkpoint(lambda y, leaf=leaf: torch.tanh(y @ leaf) + y, x)
        between = allocated() - start
        x.float().square().mean().backward()
        return x.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None], between

    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    expected, gradients, all_there = run(checkpoint)
    host = HostActivations()
    for _ in range(3):
        found, others, left = run(host.wrap(checkpoint))
        assert torch.equal(found, expected)
        assert len(others) == blocks and all(map(torch.equal, others, gradients))
        assert device == "cpu" or left <= all_there - (blocks - 2) * size
    assert host.most == blocks * size and host.held == 0
