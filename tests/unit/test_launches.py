"""How often a step calls the kernel: the host's part of a step on a GPU, where each call is a launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toolkit
from toolkit.optim import AMCS, streaming
from toolkit.optim.kernel import StepFunction
from toolkit.zero import full_precision_state_dict

LAYERS, WIDTH = 40, 64
CONFIG = {
    "train_batch_size": 1,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": None,
}
PARAMS = {"lr": 1e-2, "total_steps": 10, "compile": False, "weights": "bf16+8"}


class Deep(nn.Module):
    """Many small matrices and as many biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.float().square().mean()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Blocks of each call of a kernel."""
    found: list[int] = []
    original = StepFunction.__call__

    def counted(self: StepFunction, compiled: bool, theta: Tensor, *rest: Any) -> None:
        found.append(theta.shape[0])
        original(self, compiled, theta, *rest)

    monkeypatch.setattr(StepFunction, "__call__", counted)
    yield found


def trained(stage: int, calls: list[int]) -> tuple[list[Tensor], list[int]]:
    """Weights after two steps, and the calls of the second."""
    config = CONFIG | {
        "optimizer": {"type": "AMCS", "params": PARAMS},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = toolkit.initialize(model=Deep(), config=config)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        calls.clear()
        engine.backward(engine(torch.randn(4, WIDTH, generator=generator).bfloat16()))
        engine.step()
    weights = [tensor.clone() for tensor in full_precision_state_dict(engine).values()]
    engine.destroy()
    return weights, list(calls)


@pytest.mark.parametrize("stage", [2, 3])
def test_small_gradients_go_through_together(
    stage: int, calls: list[int], one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; on a CPU, where a call costs little, gradients of this size are not copied."""
    monkeypatch.setitem(streaming.STAGED, "cpu", WIDTH * WIDTH // 2)
    apart, each = trained(stage, calls)
    monkeypatch.setitem(streaming.STAGED, "cpu", streaming.STAGED_ELSEWHERE)
    together, few = trained(stage, calls)
    assert len(few) == 2  # matrices, biases
    assert sum(few) == sum(each) and (len(each) > LAYERS or stage == 3)
    for left, right in zip(apart, together, strict=True):
        assert torch.equal(left, right)


def test_scalars_of_all_groups_are_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    original = torch.tensor

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(original(*args, **kwargs))
        return made[-1]

    weights = [nn.Parameter(torch.randn(4, 256)) for _ in range(3)]
    groups = [{"params": [weight], "lr": 0.1 * (i + 1)} for i, weight in enumerate(weights)]
    optimizer = AMCS(groups, alpha=0.5, compile=False)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    monkeypatch.setattr("toolkit.optim.scalars.torch.tensor", counted)
    known: dict[Any, Any] = {}
    begun = [
        optimizer.begin(group, weight, known) for group, weight in zip(optimizer.param_groups, weights, strict=True)
    ]
    assert len(made) == 1
    rates = []
    for step in begun:
        assert step is not None
        assert step.scalars.data_ptr() % 16 == 0  # compiled code copies what begins elsewhere
        rates.append(float(step.scalars[step.function.names.index("lr")]))
    assert rates == pytest.approx([0.1, 0.2, 0.3])
