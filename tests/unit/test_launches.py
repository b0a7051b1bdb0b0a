"""How often a step calls the kernel: the host's part of a step on a GPU, where each call is a launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toolkit
from toolkit.optim import AMCS, RULES, joined, streaming
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


def stepped(
    shapes: list[tuple[int, ...]], dtype: torch.dtype | None, without: int | None, compile: bool
) -> list[Tensor]:
    """Weights and state of a plain loop after three steps; one tensor has no gradient in the second. No `dtype`: one
    after the other of three."""
    generator = torch.Generator().manual_seed(2)
    types = [dtype] if dtype else [torch.float32, torch.float64, torch.float16]
    made = [torch.randn(shape, generator=generator).to(types[i % len(types)]) for i, shape in enumerate(shapes)]
    weights = [nn.Parameter(x.t() if i == 1 and x.dim() == 2 else x) for i, x in enumerate(made)]
    optimizer = AMCS(weights, **{**PARAMS, "compile": compile})
    for step in range(3):
        for i, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            weight.grad = None if step == 1 and i == without else gradient
        optimizer.step()
    held = [optimizer.state[weight] for weight in weights]
    return [*(weight.detach() for weight in weights), *(x for one in held for x in one.values() if torch.is_tensor(x))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("without", [None, 3])
def test_small_tensors_of_a_plain_loop_are_stepped_together(
    dtype: torch.dtype | None, without: int | None, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, ends of blocks, more than a call takes, a large one in between: the same bits as one by one."""
    monkeypatch.setitem(joined.SMALL, "cpu", 2048)
    monkeypatch.setattr(joined, "AT_ONCE", 8192)
    shapes = [(4, 256), (256, 8), (2, 256), (4, 256), (16, 256), (1, 256), *[(3, 256)] * 12]
    shapes += [(100,), (300,), (256,), (7,), (5, 13), (3, 11)]
    together = stepped(shapes, dtype, without, compile=False)
    few = len(calls)
    monkeypatch.setitem(joined.SMALL, "cpu", 0)
    calls.clear()
    apart = stepped(shapes, dtype, without, compile=False)
    assert few <= len(calls) // 3 or dtype is None
    for left, right in zip(together, apart, strict=True):
        assert torch.equal(left, right)


def test_a_compiled_step_of_joined_tensors_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(4, 256), (2, 256), (1, 256), (100,), (300,)]
    together = stepped(shapes, torch.bfloat16, None, compile=True)
    monkeypatch.setitem(joined.SMALL, "cpu", 0)
    for left, right in zip(together, stepped(shapes, torch.bfloat16, None, compile=True), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("whole", [True, False])
def test_parameters_in_the_same_memory_are_stepped_one_after_the_other(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's are: of joined copies the last one would win, and what the others did be lost."""

    def stepped_twice() -> Tensor:
        memory = torch.ones(600)
        places = [memory, memory] if whole else [memory[:400], memory[200:]]
        weights = [nn.Parameter(place) for place in places]
        optimizer = AMCS(weights, **PARAMS)
        for weight, gradient in zip(weights, (1.0, 2.0), strict=True):
            weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        return memory

    together = stepped_twice()
    monkeypatch.setitem(joined.SMALL, "cpu", 0)
    assert torch.equal(together, stepped_twice())
    assert together[300] < 1 - 1.5 * PARAMS["lr"]  # both of them


def test_tensors_of_a_rule_without_state_are_joined(calls: list[int]) -> None:
    weights = [nn.Parameter(torch.ones(2, 256)) for _ in range(3)]
    optimizer = RULES["LOMO"](weights, lr=0.5, weight_decay=0.0, compile=False)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert calls == [6]
    assert all(torch.equal(weight, torch.full((2, 256), 0.5)) for weight in weights)
