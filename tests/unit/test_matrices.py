"""Rules with a whole matrix: what is measured of it, and which rank transforms which."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toolkit.optim import RULES, Matrix, Mean, NonNegative, Rule, State, as_optimizer
from toolkit.optim.matrices import Phase, order, rounds
from toolkit.optim.statistics import Alone, Member, Parameter, Share, small_states
from toolkit.optim.together import step_together
from toolkit.state.sharding import fragments, share_of


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class MeasuredRule(Rule):
    """A small state follows what is measured after the matrix, whose direction is given what was measured before."""

    states = (State("r", of="rows"),)
    statistics = (Mean("size", over="model"), Mean("row", over="row", by="measure_matrix"), Matrix("o"))

    lr: NonNegative = 0.1

    def scalars(self, t: int) -> dict[str, float]:
        return {"lr": self.lr}

    @staticmethod
    def measure(theta: Tensor, g: Tensor, **s: Tensor) -> Tensor:
        return g * g

    @staticmethod
    def direction(theta: Tensor, g: Tensor, **s: Tensor) -> Tensor:
        return g / s["size"].sqrt()

    @staticmethod
    def transform(matrix: Tensor) -> Tensor:
        return matrix.roll(1, 0)

    @staticmethod
    def measure_matrix(theta: Tensor, g: Tensor, *, o: Tensor, **s: Tensor) -> Tensor:
        return 2.0 * o

    @staticmethod
    def follow(r: Tensor, *, row: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (r + row,)

    @staticmethod
    def update(theta: Tensor, g: Tensor, *, o: Tensor, r: Tensor, **s: Tensor) -> tuple[Tensor, ...]:
        return (theta - (r + o),)


def test_what_is_measured_of_a_matrix_comes_after_it() -> None:
    params = [nn.Parameter(torch.zeros(2, columns)) for columns in (8, 300)]
    optimizer: Any = as_optimizer(MeasuredRule)(params, compile=False)
    for value in (3.0, 0.5):
        for p in params:
            p.grad = torch.tensor([[value], [-value]]).expand_as(p).clone()
        optimizer.step()
    # Both steps: o is -1 and 1, its rows' means -2 and 2, so r is -2 and 2, then -4 and 4.
    for p in params:
        assert torch.equal(p, torch.tensor([[8.0], [-8.0]]).expand_as(p)), p
        assert optimizer.state[p]["r"].tolist() == [-4.0, 4.0]


def test_matrices_are_shared_out_evenly_and_no_round_holds_more_than_the_largest() -> None:
    sizes = [100, 7, 60, 60, 3, 99, 1, 50]
    for ranks in (1, 2, 3, 4):
        made = rounds(sizes, ranks)
        assert sorted(number for now in made for number, _ in now) == list(range(len(sizes)))
        loads = [0] * ranks
        for now in made:
            for rank in range(ranks):
                mine = sum(sizes[number] for number, owner in now if owner == rank)
                loads[rank] += mine
                assert mine <= max(sizes)
        assert max(loads) - min(loads) <= max(sizes)


# ---- rounds that overlap ------------------------------------------------------------------------------------------


class Wire:
    """Between threads that stand for ranks: what each gave in its n-th exchange, and its n-th sum."""

    def __init__(self, size: int) -> None:
        self.size, self.given, self.ready = size, dict[tuple[int, int], tuple[Tensor, ...]](), threading.Condition()

    def put(self, number: int, rank: int, parts: tuple[Tensor, ...]) -> None:
        with self.ready:
            self.given[number, rank] = parts
            self.ready.notify_all()

    def take(self, number: int) -> list[tuple[Tensor, ...]]:
        keys = [(number, rank) for rank in range(self.size)]
        with self.ready:
            assert self.ready.wait_for(lambda: all(key in self.given for key in keys), timeout=20)
            return [self.given[key] for key in keys]


class Thread:
    """A rank, which notes what it does: "begin" and "end" of each exchange by number, and sums."""

    def __init__(self, wire: Wire, number: int) -> None:
        self.size, self.number, self.wire = wire.size, number, wire
        self.seen: list[tuple[str, int]] = []
        self.count = 0

    def _begin(self, what: str, parts: tuple[Tensor, ...]) -> int:
        number, self.count = self.count, self.count + 1
        self.seen.append((what, number))
        self.wire.put(number, self.number, parts)
        return number

    def add(self, tensor: Tensor) -> Tensor:
        return sum((parts[0] for parts in self.wire.take(self._begin("sum", (tensor,)))), start=torch.zeros(()))

    def swap(self, sent: Tensor, given: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        number = self._begin("begin", sent.clone().split(list(given)))
        sent.fill_(float("nan"))

        def arrived() -> Tensor:
            self.seen.append(("end", number))
            parts = [parts[self.number] for parts in self.wire.take(number)]
            assert [part.numel() for part in parts] == list(received)
            return torch.cat(parts)

        return arrived


SHAPES = [(64, 96), (40, 136), (96, 64), (64, 96), (3, 40, 24), (16, 16), (5, 7), (64, 96)]


def step_in_ranks(rule: str, size: int) -> tuple[list[Tensor], list[Thread]]:
    """The weights after two steps of parameters that are cut for so many ranks, and what the ranks did."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(2)]
    wire, failures = Wire(size), list[BaseException]()
    ranks = [Thread(wire, number) for number in range(size)]

    def work(rank: Thread) -> None:
        try:
            optimizer: Any = RULES[rule]([nn.Parameter(torch.zeros(16, 16))], lr=0.1, compile=False)
            group = optimizer.param_groups[0]
            cut, at = [], 0
            for x in whole:
                share = share_of(x.shape, size)
                cut.append(fragments(0, x.numel(), size=share, before=at))
                at += share
            master = torch.zeros(at)
            mine = [next((one for one in held if one.rank == rank.number), None) for held in cut]
            for x, own in zip(whole, mine, strict=True):
                if own is not None:
                    master[own.elements] = x.flatten()[own.start : own.stop]
            parameters = [Parameter(tuple(x.shape), "ffn") for x in whole]
            for step in gradients:
                begun = optimizer.begin(group, master)
                small = small_states(optimizer.whole(group), parameters, optimizer.state[master], master.device)
                members = []
                for i, own in enumerate(mine):
                    share = Share(own, step[i].flatten()[own.start : own.stop], 0) if own is not None else None
                    members.append(Member(parameters[i], begun, small[i], cut[i], share))
                step_together(members, torch.ones(()), rank if size > 1 else Alone())
            for x, own in zip(whole, mine, strict=True):
                if own is not None:
                    x.view(-1)[own.start : own.stop] = master[own.elements]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return whole, ranks


@pytest.mark.parametrize("rule", ["Muon8", "NorMuon", "SinkGD"])
def test_rounds_overlap_in_one_order_on_all_ranks_and_change_no_number(rule: str) -> None:
    want, _ = step_in_ranks(rule, 1)
    for size in (2, 3):
        found, ranks = step_in_ranks(rule, size)
        for x, y in zip(want, found, strict=True):
            assert torch.equal(x, y) if rule != "NorMuon" else torch.allclose(x, y, rtol=0, atol=1e-6)
        first, *others = [rank.seen for rank in ranks]
        assert all(other == first for other in others)
        going = 0
        for what, _ in first:
            going += {"begin": 1, "end": -1, "sum": 0}[what]
            assert 0 <= going <= 3
        begun = {number: place for place, (what, number) in enumerate(first) if what == "begin"}
        ended = {number: place for place, (what, number) in enumerate(first) if what == "end"}
        alone = [number for number, place in begun.items() if ended[number] == place + 1]
        # What nothing can hide, of each of two steps: the way back of its last round.
        assert len(alone) == 2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_while_a_round_is_transformed_the_next_has_been_sent_and_the_last_is_on_its_way_back(
    count: int, ranks: int
) -> None:
    made = list(order(count, ranks))
    for number in range(count):
        assert [phase for one, phase in made if one == number] == list(Phase)
    place = {one: i for i, one in enumerate(made)}
    for number in range(count if ranks > 1 else 0):
        now = place[number, Phase.TRANSFORM]
        if number:
            assert place[number - 1, Phase.RETURN] < now < place[number - 1, Phase.UPDATE]
        if number + 1 < count:
            assert place[number + 1, Phase.SEND] < now
        if number + 2 < count:
            assert place[number, Phase.UPDATE] < place[number + 1, Phase.RETURN]
            assert place[number + 2, Phase.SEND] > now, "no more rounds than these"


def test_experts_are_made_orthogonal_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(3, 20, 32, generator=generator)
    gradient = torch.randn(experts.shape, generator=generator)
    for rule in ("Muon8", "NorMuon", "AdaMuon", "SinkGD"):
        stack = nn.Parameter(experts.clone())
        apart = [nn.Parameter(one.clone()) for one in experts]
        for p, g in zip([stack, *apart], [gradient, *gradient], strict=True):
            p.grad = g.clone()
            optimizer: Any = RULES[rule]([p], lr=0.1, state_format="fp32", compile=False)
            optimizer.step()
        # NorMuon and AdaMuon divide by the rms over the parameter, which for a stack is over all its matrices.
        near = {"Muon8": 0.0, "SinkGD": 0.0}.get(rule, 0.02)
        moved = torch.stack([p.detach() for p in apart]) - experts
        assert (stack.detach() - experts - moved).norm() <= near * moved.norm(), rule
