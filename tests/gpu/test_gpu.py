"""What only a CUDA device can show: `pytest tests/gpu -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from toolkit.optim import AMCS, SOAM

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "extra"), [(AMCS, {"total_steps": 20}), (SOAM, {})])
def test_cuda_gives_the_cpu_numbers(rule: Any, extra: dict[str, Any], dtype: torch.dtype) -> None:
    moved = {}
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(300, 257, generator=generator).to(dtype)
        p = nn.Parameter(start.to(device, copy=True))
        optimizer = rule([p], **extra)
        for _ in range(10):
            p.grad = (torch.randn(300, 257, generator=generator) * 1e-2).to(dtype).to(device)
            optimizer.step()
        moved[device] = p.detach().cpu().float() - start.float()
    error = (moved["cuda"] - moved["cpu"]).norm() / moved["cpu"].norm()
    assert error < (2e-2 if dtype == torch.bfloat16 else 2e-3), error


@pytest.mark.parametrize("rule", [AMCS, SOAM])
def test_the_step_keeps_no_full_size_temporaries(rule: Any) -> None:
    p = nn.Parameter(torch.randn(4096, 4096, device="cuda"))
    p.grad = torch.randn_like(p)
    optimizer = rule([p], **({"total_steps": 10} if rule is AMCS else {}))
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 0.1 * p.numel(), "bytes per element"
