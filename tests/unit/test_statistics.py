"""What a rule may look at beside single elements: means by owner, small states, schedules of a statistic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.optim import RULES, Matrix, Mean, NonNegative, Rule, State, as_optimizer
from toolkit.optim.kernel import StepFunction
from toolkit.optim.schedules import Cosine, Linear, Points, fraction_done
from toolkit.optim.statistics import Alone, Member, Parameter, Share
from toolkit.optim.together import step_together
from toolkit.state.sharding import Fragment

SCALE = Points(((0.0, 2.0), (1.0, 1.0), (3.0, 0.5)))


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class ClosedRule(Rule):
    """A rate that follows the mean square of a component's gradient, and weights that follow the model's."""

    states = (State("m"),)
    statistics = (Mean("part2", over="component"), Mean("all2", over="model"))

    lr: NonNegative = 0.1

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr}

    @staticmethod
    def measure(theta: Tensor, g: Tensor, m: Tensor, **s: Tensor) -> tuple[Tensor, Tensor]:
        return g * g, (g + 1.0) ** 2  # of padding the second is no 0

    @staticmethod
    def update(theta: Tensor, g: Tensor, m: Tensor, *, part2: Tensor, all2: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return theta - s["lr"] * SCALE.of(part2) * g, m + all2


class CentredRule(Rule):
    """What a row has more than its mean, and a state that counts steps by row."""

    states = (State("count", of="rows"),)
    statistics = (Mean("row_mean", over="row"),)

    lr: NonNegative = 0.1

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr}

    @staticmethod
    def measure(theta: Tensor, g: Tensor, **s: Tensor) -> Tensor:
        return g

    @staticmethod
    def follow(count: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (count + 1.0,)

    @staticmethod
    def update(theta: Tensor, g: Tensor, *, row_mean: Tensor, count: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (theta - s["lr"] * (g - row_mean) / count,)


def model(optimizer_class: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Any], Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 50), (1, 7), (300,), (4, 3, 100)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    groups = [{"params": params[:2], "component": "ffn"}, {"params": params[2:], "component": "norm"}]
    optimizer = optimizer_class(groups, **options)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params, optimizer


@pytest.mark.parametrize(
    ("state_format", "compiled"),
    [("fp32", False), ("fp32", True), ("4bit", False), pytest.param("4bit", True, marks=pytest.mark.slow)],
)
def test_means_over_components_and_the_model(state_format: str, compiled: bool) -> None:
    params, optimizer = model(as_optimizer(ClosedRule), state_format=state_format, compile=compiled)
    before = [p.detach().double().numpy() for p in params]
    optimizer.step()
    grads = [p.grad.double().numpy() for p in params]
    for mine in ((0, 1), (2, 3)):
        square = np.mean(np.concatenate([grads[i].ravel() ** 2 for i in mine]))
        scale = np.interp(square, [0.0, 1.0, 3.0], [2.0, 1.0, 0.5])
        for i in mine:
            assert np.allclose(params[i].detach(), before[i] - 0.1 * scale * grads[i], atol=1e-6)
    whole = np.mean(np.concatenate([(g.ravel() + 1.0) ** 2 for g in grads]))
    assert np.allclose(optimizer.state[params[2]]["m"].flatten()[:300], whole, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_means_over_rows_and_a_state_of_them(dtype: torch.dtype) -> None:
    params, optimizer = model(as_optimizer(CentredRule), dtype, weights="bf16+16", compile=False)
    want = [p.detach().double().clone().numpy() for p in params]
    for step in (1, 2, 3):
        optimizer.step()
        for i, p in enumerate(params):
            g = p.grad.double().numpy().reshape(-1, p.shape[-1])
            want[i] = want[i] - (0.1 / step * (g - g.mean(1, keepdims=True))).reshape(want[i].shape)
    for p, value in zip(params, want, strict=True):
        assert np.allclose(p.detach().double(), value, atol=1e-5 if dtype != torch.bfloat16 else 2e-2)
    assert [optimizer.state[p]["count"].tolist() for p in params] == [[3.0] * n for n in (30, 1, 1, 4 * 3)]
    assert optimizer.state_bytes()["count"] == 4 * 44


def test_small_states_are_saved_and_loaded() -> None:
    params, optimizer = model(as_optimizer(CentredRule))
    optimizer.step()
    others, other = model(RULES["Centred"])
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        assert torch.equal(optimizer.state[p]["count"], other.state[q]["count"])
        q.data.copy_(p.detach())
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_any_layout_of_memory_and_parameters_without_gradient() -> None:
    plain, optimizer = model(as_optimizer(ClosedRule), compile=False)
    turned, other = model(RULES["Closed"], compile=False)
    turned[0].data = turned[0].data.t().contiguous().t()
    for one in (plain, turned):
        one[3].grad = None
    optimizer.step()
    other.step()
    assert not turned[0].is_contiguous()
    assert all(torch.equal(p, q) for p, q in zip(plain, turned, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gap", [0, 512])
@pytest.mark.parametrize("shapes", [[(4, 128), (2, 128), (512, 256), (3, 256)], [(300,), (5,), (256,), (70,)]])
def test_what_lies_in_one_tensor_goes_through_one_call(
    shapes: list[tuple[int, ...]], gap: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One measuring and one updating call for all, whose numbers are those of each parameter by itself."""
    generator = torch.Generator().manual_seed(0)
    optimizer_class = as_optimizer(ClosedRule)
    before = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [nn.Parameter(x.clone()) for x in before]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    apart: Any = optimizer_class(params, compile=compiled)
    apart.step()

    # Gradients lie one after the other, with what pads the shares of a rank between them.
    sizes, flat = [p.numel() + gap for p in params], torch.zeros(sum(p.numel() + gap for p in params))
    buffer, members, offset = torch.zeros_like(flat), [], 0
    one: Any = optimizer_class([params[0]], compile=compiled)
    begun = one.begin(one.param_groups[0], flat)
    for x, g, size in zip(before, gradients, sizes, strict=True):
        share, parameter = Fragment(0, 0, x.numel(), offset), Parameter(tuple(x.shape), "other")
        flat[share.elements], buffer[share.elements] = x.flatten(), g.flatten()
        members.append(Member(parameter, begun, {}, [share], Share(share, buffer[share.elements], offset // 256)))
        offset += size
    calls, call = [], StepFunction.__call__

    def count(self: StepFunction, *args: Any) -> None:
        calls.append(self.name)
        call(self, *args)

    monkeypatch.setattr(StepFunction, "__call__", count)
    step_together(members, torch.ones(()), Alone())
    if gap == 0:
        assert len(calls) == len(set(calls)) == 2
    for p, member in zip(params, members, strict=True):
        assert torch.allclose(flat[member.fragments[0].elements], p.detach().flatten(), rtol=0, atol=1e-6)
        if p.dim() == 1:
            m = one.state[flat]["m"].flatten()[member.fragments[0].elements]
            assert torch.allclose(m, apart.state[p]["m"].flatten()[: p.numel()], rtol=1e-6)
    assert all(member.share is not None and not member.share.gradient.numel() for member in members)


class RelativeRule(Rule):
    """The momentum of a gradient relative to what its row and column usually are: no number but of real elements."""

    states = (State("r", of="rows"), State("c", of="columns"), State("m"))
    statistics = (Mean("row", over="row"), Mean("column", over="column"))

    lr: NonNegative = 0.1

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr, "rate": 1.0 / t}

    @staticmethod
    def measure(theta: Tensor, g: Tensor, m: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return g * g, g * g

    @staticmethod
    def follow(r: Tensor, c: Tensor, *, row: Tensor, column: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return r + s["rate"] * (row - r), c + s["rate"] * (column - c)

    @staticmethod
    def update(theta: Tensor, g: Tensor, m: Tensor, *, r: Tensor, c: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        m = m + 0.1 * (g * r.rsqrt() * c.rsqrt() - m)
        return theta - s["lr"] * m, m


@pytest.mark.parametrize(
    ("state_format", "compiled"),
    [("8bit", False), pytest.param("8bit", True, marks=pytest.mark.slow), ("4bit", False), ("4bit", True)],
)
def test_nothing_behind_the_end_of_a_matrix_is_seen_in_its_last_block(state_format: str, compiled: bool) -> None:
    optimizer_class = as_optimizer(RelativeRule)
    params, optimizer = model(optimizer_class, state_format=state_format, compile=compiled)
    exact, other = model(optimizer_class, state_format="fp32", compile=False)
    for _ in range(3):
        optimizer.step()
        other.step()
    for p, q in zip(params, exact, strict=True):
        assert (p - q).norm() < 0.02 * q.norm()


def declared(**body: Any) -> type[Rule]:
    return type("WrongRule", (ClosedRule,), {"__module__": __name__} | body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"statistics": (Mean("m", over="model"),)}, "'m' names two of its states and statistics"),
        ({"statistics": (Mean("x", over="block"),)}, "'x' is over 'block', but must be over parameter"),  # type: ignore[arg-type]
        ({"statistics": (Mean("x", over="model", by="size"),)}, "needs a function 'size'"),
        ({"statistics": (Matrix("x"), Matrix("y"))}, "two matrices"),
        ({"statistics": (Matrix("x"),)}, "needs a function 'direction'"),
        ({"states": (State("m"), State("r", of="lines"))}, "of 'lines', but must be of rows, columns or parameter"),
        ({"states": (State("r", of="rows"),), "statistics": ()}, "there are no means to follow"),
        ({"states": (State("m"), State("r", of="rows"))}, "state 'r' is of rows, which needs a function 'follow'"),
        ({"statistics": (Mean("lr", over="model"),)}, "'lr' names one of its scalars and one of its states or"),
        ({"statistics": (Mean("x", over="model", by="update"),)}, "a function of its own, but 'update' updates"),
        (
            {
                "statistics": (Mean("x", over="model"), Matrix("o", by="measure")),
                "transform": staticmethod(lambda matrix: matrix),
            },
            "'o' must have a function of its own, but 'measure' gives means",
        ),
        (
            {
                "statistics": (Matrix("o"), Mean("x", over="component")),
                "direction": staticmethod(lambda theta, g, m, **s: g),
                "transform": staticmethod(lambda matrix: matrix),
                "measure": staticmethod(lambda theta, g, m, *, o, **s: o),
            },
            "'x' is over 'component', but must be over parameter, row or column, since 'measure' runs after the matrix",
        ),
        ({"measure": staticmethod(lambda theta, g, m, **s: (g, g.cumsum(0)))}, "WrongRule.measure is not elementwise"),
        ({"measure": staticmethod(lambda theta, g, m, **s: g)}, "measure returns 1 tensors, but must return 2"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(body: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        as_optimizer(declared(**body))


class LaterRule(CentredRule):
    """Weights follow the mean over a row of the gradient before this one."""

    states = (State("now", of="rows"), State("before", of="rows"))
    statistics = (Mean("row", over="row"),)

    lr: NonNegative = 1.0

    @staticmethod
    def follow(now: Tensor, before: Tensor, *, row: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return row, now

    @staticmethod
    def update(theta: Tensor, g: Tensor, *, before: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (theta - s["lr"] * before,)


def test_a_small_state_that_is_handed_on_is_the_one_before_the_step() -> None:
    p = nn.Parameter(torch.zeros(4, 8))
    optimizer: Any = as_optimizer(LaterRule)([p], compile=False)
    for value in (1.0, 2.0, 5.0):
        p.grad = torch.full((4, 8), value)
        optimizer.step()
    assert torch.equal(p, torch.full((4, 8), -3.0))


def test_small_states_are_fp32_whatever_torch_makes_by_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        p = nn.Parameter(torch.zeros(4, 8, dtype=torch.float32))
        p.grad = torch.full((4, 8), 1.001, dtype=torch.float32)
        optimizer: Any = as_optimizer(LaterRule)([p], compile=False)
        optimizer.step()
        assert optimizer.state[p]["now"].tolist() == pytest.approx([1.001] * 4, abs=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


class TurnedRule(Rule):
    """Returns a matrix with rows for columns."""

    states = ()
    statistics = (Matrix("o"),)

    lr: NonNegative = 0.1

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr}

    @staticmethod
    def direction(theta: Tensor, g: Tensor, **s: Tensor) -> Tensor:
        return g

    @staticmethod
    def transform(matrix: Tensor) -> Tensor:
        return matrix.T

    @staticmethod
    def update(theta: Tensor, g: Tensor, *, o: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (theta - s["lr"] * o,)


class RepeatedRule(LaterRule):
    """Returns one number for all rows."""

    @staticmethod
    def follow(now: Tensor, before: Tensor, *, row: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return row.mean(), now


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (TurnedRule, r"TurnedRule.transform returns \[8, 4\] for a matrix of \[4, 8\]"),
        (RepeatedRule, r"RepeatedRule.follow returns \[\] for state 'now', which is \[4\]"),
    ],
)
def test_another_shape_than_a_matrix_or_a_small_state_has_is_refused(rule: Any, says: str) -> None:
    p = nn.Parameter(torch.zeros(4, 8))
    p.grad = torch.ones(4, 8)
    with pytest.raises(UserError, match=says):
        as_optimizer(rule)([p], compile=False).step()


def test_schedules() -> None:
    assert [Linear().at(x) for x in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert [Cosine(3.0, 1.0).at(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([3.0, 2.0, 1.0])
    assert [SCALE.at(x) for x in (-1.0, 0.0, 0.5, 2.0, 9.0)] == [2.0, 2.0, 1.5, 0.75, 0.5]
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0, 9.0])
    assert SCALE.of(x).tolist() == [SCALE.at(value) for value in x.tolist()]
    assert [fraction_done(t, 5) for t in (1, 3, 5, 6)] == [0.0, 0.5, 1.0, 1.0]
    assert fraction_done(1, 1) == 0.0
