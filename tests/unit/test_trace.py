"""A traced step of plain torch code whose allocations are known: every byte, its category and its phase."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.memory import trace as trace_module
from toolkit.memory.storages import Lifetime
from toolkit.memory.trace import StepTrace
from toolkit.records import categories as c

ROWS, WIDE, VOCABULARY = 64, 32, 128
FLOAT = 4
HIDDEN = ROWS * WIDE * FLOAT
LOGITS = ROWS * VOCABULARY * FLOAT


class Block(nn.Module):
    """Keeps the result of its exponential for the backward pass, and needs one tensor for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDE))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = torch.full_like(x, -1.0)
        return torch.exp(x * self.scale + shift)


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDE)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDE, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x), tokens)


def traced(micro_batches: int = 1, tied: bool = False) -> StepTrace:
    torch.manual_seed(0)
    model = Model(tied)
    tokens = torch.arange(ROWS)

    def held() -> Iterator[tuple[str, str, Tensor]]:
        for name, parameter in model.named_parameters():
            yield c.WEIGHTS, name, parameter.data
            if parameter.grad is not None:
                yield c.GRADIENTS, name, parameter.grad

    trace = StepTrace(model, model.head, held, on_gpu=False)
    with trace:
        for _ in range(micro_batches):
            trace.phase(c.FORWARD)
            loss = model(tokens)
            trace.phase(c.BACKWARD)
            loss.backward()
            del loss
        trace.phase(c.STEP)
        with torch.no_grad():
            for parameter in model.parameters():
                update = parameter.grad * -0.1
                parameter.add_(update)
                del update
        model.zero_grad()
    return trace


def of(trace: StepTrace, category: str, phase: str | None = None) -> list[Lifetime]:
    return [x for x in trace.storages.lifetimes if x.category == category and phase in (None, x.phase)]


@pytest.fixture
def one(one_thread: None) -> StepTrace:
    return traced()


def test_weights_are_what_was_there_before(one: StepTrace) -> None:
    expected = {
        "embedding.weight": VOCABULARY * WIDE * FLOAT,
        "layers.0.scale": WIDE * FLOAT,
        "layers.1.scale": WIDE * FLOAT,
        "head.weight": VOCABULARY * WIDE * FLOAT,
    }
    found = {lifetime.what: lifetime.bytes for lifetime in of(one, c.WEIGHTS)}
    assert found == expected
    assert all(lifetime.allocated_at == -1 and lifetime.freed_at is None for lifetime in of(one, c.WEIGHTS))
    assert (one.curve.by_category[c.WEIGHTS] == sum(expected.values())).all()


def test_activations_are_what_the_backward_pass_needs(one: StepTrace) -> None:
    # The embedding's output and the exponential of each block; the last one is the head's input.
    forward = of(one, c.ACTIVATIONS, c.FORWARD)
    assert sorted(lifetime.bytes for lifetime in forward) == [HIDDEN] * 3
    ends = next(start for name, start in one.storages.phases if name == c.BACKWARD)
    assert one.curve.by_category[c.ACTIVATIONS][ends - 1] == 3 * HIDDEN
    assert one.curve.by_category[c.ACTIVATIONS][-1] == 0


def test_transients_are_gone_when_their_block_is(one: StepTrace) -> None:
    # In each block the shift, the product and the sum; the backward pass needs none of them.
    forward = of(one, c.TRANSIENTS, c.FORWARD)
    assert sorted(lifetime.bytes for lifetime in forward) == [HIDDEN] * 6
    shift = [lifetime for lifetime in forward if lifetime.what == "aten.full_like"]
    assert len(shift) == 2 and all(
        "test_trace.py" in lifetime.where and "forward" in lifetime.where for lifetime in shift
    )
    # All three are held when the sum is made, beside the block's input.
    block = shift[0].scope
    assert block is not None and block.closed is not None
    inside = one.curve.by_category[c.TRANSIENTS]
    assert inside.max() == 3 * HIDDEN


def test_logits_reach_from_the_head_to_the_gradient_of_its_input(one: StepTrace) -> None:
    made = of(one, c.LOGITS)
    assert [lifetime.what for lifetime in made if lifetime.bytes == LOGITS and lifetime.phase == c.FORWARD] == [
        "aten.mm",
        "aten._log_softmax",
    ]
    backward = [lifetime for lifetime in made if lifetime.phase == c.BACKWARD and lifetime.bytes == LOGITS]
    assert len(backward) == 2 and all(lifetime.where.startswith("backward: ") for lifetime in backward)
    # Softmax and the gradient of the loss, then that of the logits; the logits themselves are no longer there.
    assert 0 <= one.curve.by_category[c.LOGITS].max() - 3 * LOGITS < 64  # and the loss


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_is_not_the_heads(one_thread: None, tied: bool) -> None:
    trace = traced(tied=tied)
    late = [lifetime for lifetime in trace.storages.lifetimes if "Embedding" in lifetime.where]
    assert late and all(lifetime.category in (c.GRADIENTS, c.TRANSIENTS) for lifetime in late)


def test_gradients_are_named_and_live_until_they_are_dropped(one: StepTrace) -> None:
    names = {lifetime.what: lifetime.bytes for lifetime in of(one, c.GRADIENTS)}
    assert names == {
        "gradient of embedding.weight": VOCABULARY * WIDE * FLOAT,
        "gradient of layers.0.scale": WIDE * FLOAT,
        "gradient of layers.1.scale": WIDE * FLOAT,
        "gradient of head.weight": VOCABULARY * WIDE * FLOAT,
    }
    step = next(start for name, start in one.storages.phases if name == c.STEP)
    held = one.curve.by_category[c.GRADIENTS]
    assert held[step - 1] == sum(names.values()) and held[-1] == 0


def test_the_step_holds_one_update_at_a_time(one: StepTrace) -> None:
    updates = [lifetime for lifetime in of(one, c.TRANSIENTS, c.STEP) if lifetime.what.startswith("aten.mul")]
    assert sorted(lifetime.bytes for lifetime in updates) == sorted(lifetime.bytes for lifetime in of(one, c.GRADIENTS))
    phase = next(phase for phase in one.curve.by_phase() if phase.name == c.STEP)
    assert 0 <= phase.held[c.TRANSIENTS] - VOCABULARY * WIDE * FLOAT < 64  # the factor is a tensor, too


def test_categories_add_up_to_the_peaks(one: StepTrace) -> None:
    phases = one.curve.by_phase()
    assert [phase.name for phase in phases] == [c.FORWARD, c.BACKWARD, c.STEP]
    for phase in phases:
        assert sum(phase.held.values()) == phase.peak
    timeline = one.curve.timeline(one.storages.nanoseconds)
    totals = [sum(values) for values in zip(*timeline.held.values(), strict=True)]
    assert max(totals) == one.curve.total.max() == max(phase.peak or 0 for phase in phases)
    assert timeline.milliseconds == sorted(timeline.milliseconds or [])


def test_micro_batches_are_told_apart(one_thread: None) -> None:
    single, double = traced(1), traced(2)
    for category in (c.ACTIVATIONS, c.LOGITS):
        assert double.curve.by_category[category].max() == single.curve.by_category[category].max(), category
    assert len(of(double, c.ACTIVATIONS, c.FORWARD)) == 2 * len(of(single, c.ACTIVATIONS, c.FORWARD))
    assert len(of(double, c.LOGITS)) == 2 * len(of(single, c.LOGITS))
    # The second forward pass holds the gradients of the first.
    forward = next(phase for phase in double.curve.by_phase() if phase.name == c.FORWARD)
    assert forward.held[c.GRADIENTS] == sum(lifetime.bytes for lifetime in of(single, c.GRADIENTS))


def test_what_an_operation_uses_within_itself_is_seen(one_thread: None) -> None:
    model, values = nn.Linear(4, 4), torch.randn(40_000)
    trace = StepTrace(model, None, lambda: [(c.WEIGHTS, "values", values)], on_gpu=False)
    with trace:
        trace.phase(c.STEP)
        values.median()
    inside = [lifetime for lifetime in trace.storages.lifetimes if lifetime.what.startswith("inside ")]
    assert sum(lifetime.bytes for lifetime in inside) >= values.numel() * FLOAT  # median works on a copy
    assert all(lifetime.category == c.TRANSIENTS and lifetime.phase == c.STEP for lifetime in inside)
    assert trace.curve.total.max() >= 2 * values.numel() * FLOAT


def test_what_another_thread_is_slow_to_free_keeps_its_name(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of gloo's is, between the end of the tensor that it sent and the release of its memory."""
    monkeypatch.setattr(trace_module, "counted", lambda: True)
    size = 4_000_000
    going, allocated = threading.Event(), threading.Event()

    def slow(_: object) -> None:  # the tracker's own callback, which is newer, has run by now
        going.set()
        assert allocated.wait(60)

    model = nn.Linear(8, 8)
    trace_module._flag().value = True
    try:
        sent = [torch.empty(1_000_000)]
        watched = weakref.ref(sent[0].untyped_storage(), slow)
        trace = StepTrace(model, None, lambda: [(c.BUCKETS, "sent", one) for one in sent], on_gpu=False)
        with trace:
            trace.phase(c.REDUCE)
            thread = threading.Thread(target=sent.clear)
            thread.start()
            assert going.wait(60)
            kept = torch.empty(2_000_000)
            allocated.set()
            thread.join()
            trace.phase(c.STEP)
            last = torch.empty(10)
    finally:
        trace_module._flag().value = False
    assert watched() is None and len(kept) > len(last)
    other, total = trace.curve.by_category[c.OTHER], trace.curve.total
    assert np.ptp(other) < 10_000  # what earlier traces of this process left is in all of them
    assert total.max() - other[0] == pytest.approx(size + 8_000_000, abs=10_000)
    assert total[-1] - other[0] == pytest.approx(8_000_000, abs=10_000)


def test_a_phase_in_which_nothing_happens_holds_what_was_there(one_thread: None) -> None:
    model = nn.Linear(8, 8)
    trace = StepTrace(model, None, lambda: [(c.WEIGHTS, "weight", model.weight.data)], on_gpu=False)
    with trace:
        trace.phase(c.FORWARD)
        kept = torch.ones(1000)
        trace.phase(c.REDUCE)
        trace.phase(c.STEP)
        del kept
    peaks = {phase.name: phase.peak for phase in trace.curve.by_phase()}
    assert peaks[c.REDUCE] == peaks[c.FORWARD] == 4000 + 256


def test_cublas_workspaces_are_not_other(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose allocator is played here: it has 100,000 bytes, of which cuBLAS gives 40,000 back."""
    allocated = [100_000]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[0])
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: allocated.__setitem__(0, 60_000), raising=False)
    model = nn.Linear(16, 16, bias=False)
    trace = StepTrace(model, None, lambda: [(c.WEIGHTS, "weight", model.weight.data)], on_gpu=True)
    with trace:
        trace.phase(c.FORWARD)
        kept = model(torch.randn(4, 16))
    before = {name: int(values[0]) for name, values in trace.curve.by_category.items()}
    assert (before[c.WEIGHTS], before[c.WORKSPACES], before[c.OTHER]) == (1024, 40_000, 60_000 - 1024)
    assert kept.shape == (4, 16)
