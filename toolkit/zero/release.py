"""`release_gradients`: each bucket of gradients is reduced, applied and freed during the backward pass.

The global norm is known only when all gradients are there, and then they would all have to be held. So a gradient is
scaled by the smallest of

* 1,
* clip / (global norm of the previous step), once there is one,
* clip / (norm of this parameter's gradient), which no exact clipping would exceed, since the global norm is larger.

The last one bounds what a sudden spike can do, the second follows the usual size of gradients. A gradient that is not
finite, and all that come after it in that step, are not applied, and the step counts as skipped; what was applied
before stays.

A weight may be stepped as soon as its gradient is there: autograd makes it after the last use of the weight in the
backward pass, whatever is gathered, computed again or shared. So no part of that pass sees a new weight.

The host decides what is applied, and a device would stand still if the host waited for each norm as soon as it is asked
for. So on a device up to a bucket of gradients waits for their norms, with the backward pass queued behind them.

With `offload_optimizer` those that wait do so on the host, which steps them there while the device does what is queued.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.factored import settle
from toolkit.optim.rule import waits_for
from toolkit.optim.statistics import Member, Share
from toolkit.optim.streaming import TensorStep
from toolkit.optim.together import Found, step_together
from toolkit.state.codecs import BLOCK
from toolkit.zero.access import Access
from toolkit.zero.agreement import Order
from toolkit.zero.exchange import DataParallel, whole_parameters, with_small
from toolkit.zero.gradients import GradientFragment, HostCopy, squared_norms, to_host
from toolkit.zero.shards import Shard

RELEASED_NORM = "released_norm"
"""Key in the first parameter group of the norm that the next step is clipped by; checkpoints keep it."""


@dataclass(frozen=True)
class _Measured:
    """A bucket on its way: this rank's pieces, and the squared norm of the whole gradient of each of `params`, fp64.

    The last of `squares` is the sum over ranks of `order`, in which their gradients came. `elements` are the most that
    a rank holds of it: the same number on all ranks, which have to use a bucket at the same moment.
    """

    params: Sequence[Tensor]
    pieces: list[GradientFragment]
    squares: HostCopy
    order: Order
    elements: int


class Releasing(Access):
    """In front of a ZeRO optimizer of this package: gradients are used as they come, of one micro-batch a step.

    Groups of matrices of whole blocks are; all others (norms; they are small) are updated at the end of the step.
    Of factored states a step uses rows and columns as they were before it: parts of a matrix wait for no others.
    """

    clip_grad: float
    reduce_bucket_size: int
    overflow: bool
    _ranks: DataParallel
    _begin: Callable[[Shard], TensorStep | None]

    def _hold(self, pieces: list[GradientFragment]) -> None:
        """Keep what is updated at the end of the step."""
        raise NotImplementedError

    def _step_late(self, late: list[Shard], scale: Tensor) -> None:
        """Update flat tensors whose gradients were held."""
        raise NotImplementedError

    def _plan(self) -> None:
        """Once all is laid out: what is updated when."""
        if refusal := _refusal(self):
            raise UserError(f"optimizer.params.release_gradients {refusal}")
        self._delays = not get_accelerator().is_synchronized_device()
        self._offloads = self._delays and self._shards[0].tensor.is_cpu
        self._late = self._waiting_shards()
        late = {shard.number for shard in self._late}
        self._early = [shard for shard in self._shards if shard.number not in late]
        self._numbers_early = {shard.number for shard in self._early}
        self._start()

    def _waiting_shards(self) -> list[Shard]:
        """Those that are updated at the end of the step."""
        placed = [member for shard in self._shards for member in shard.members]
        late = {one.group for one in placed if len(one.shape) < 2 or one.shape.numel() % BLOCK}
        return [shard for shard in self._shards if shard.group in late]

    @property
    def _previous_norm(self) -> float | None:
        """Global norm of the latest step that was not skipped; kept in a parameter group, which checkpoints save."""
        norm: float | None = self.optimizer.param_groups[0].get(RELEASED_NORM)
        return norm

    def _start(self) -> None:
        """Nothing of this step has been seen."""
        self._seen: set[int] = set()
        self._squares = 0.0
        self._broken = False
        self._steps: dict[int, TensorStep | dict[int, Member]] = {}
        self._measured: deque[_Measured] = deque()
        self._order = Order()
        self._numbers: Found = {}

    def _gone(self, param: Tensor) -> str:
        return (
            f"the gradient of {self.param_names.get(param, 'a parameter')} is gone: with "
            "optimizer.params.release_gradients each is freed as soon as it has been used"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Refused where weights have been updated with the gradients that are to be dropped."""
        if self._seen or self.is_open:
            raise UserError(
                "zero_grad between a backward pass and its step comes too late: with "
                "optimizer.params.release_gradients gradients are used during the backward pass; leave it out"
            )
        super().zero_grad(set_to_none)  # type: ignore[misc]

    def _reduced(self, params: Sequence[Tensor], pieces: list[GradientFragment]) -> None:
        """A bucket has been reduced: this rank's `pieces` of the gradients of `params`."""
        for param in params:
            if id(param) in self._seen:
                raise UserError(
                    "optimizer.params.release_gradients needs the whole gradient of a parameter at once, but "
                    f"{self.param_names.get(param, 'one')} got a second part (reentrant activation checkpointing or "
                    "several backward passes in a step); leave it out"
                )
            self._seen.add(id(param))
        order, self._order = self._order, Order()
        sums = self._squared_norms(params, pieces, order)
        if self._offloads:
            for piece in pieces:
                piece.gradient = to_host(piece.gradient)
        squares = HostCopy(sums)
        self._measured.append(_Measured(params, pieces, squares, order, self._most(params)))
        if not self._delays:
            self._apply()
        while len(self._measured) > 1 and sum(bucket.elements for bucket in self._measured) > self.reduce_bucket_size:
            self._apply()

    def _most(self, params: Sequence[Tensor]) -> int:
        """Elements of these that one rank holds, at most."""
        held = Counter[int]()
        for param in params:
            for part in self._placed[id(param)][1].fragments:
                held[part.rank] += part.numel
        return max(held.values(), default=0)

    def _squared_norms(self, params: Sequence[Tensor], pieces: list[GradientFragment], order: Order) -> Tensor:
        """Of the whole gradient of each parameter, and the sum of `order`; fp64, the same on every rank."""
        mine = {}
        if pieces:  # of a parameter a rank has one piece, or none
            squares = squared_norms([piece.gradient for piece in pieces])
            mine = {id(piece.param): square for piece, square in zip(pieces, squares, strict=True)}
        device = get_accelerator().current_device_name()
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        return self._ranks.add(torch.stack([*(mine.get(id(param), nothing) for param in params), order.tensor(device)]))

    @property
    def _unapplied(self) -> list[Tensor]:
        """Gradients that wait for their norms, for the memory ledger."""
        return [piece.gradient for bucket in self._measured for piece in bucket.pieces]

    def _apply(self) -> None:
        """Use the gradients that wait longest."""
        bucket = self._measured.popleft()
        *squares, order = bucket.squares.wait().tolist()
        bucket.order.check(order, self._ranks.size)
        norms = [square**0.5 for square in squares]
        self._squares += sum(squares)
        self._broken |= not all(norm < float("inf") for norm in norms)
        if self._broken:
            return
        pieces = {id(piece.param): piece for piece in bucket.pieces}
        waiting, bounded = [], dict[float, list[Member]]()
        for param, norm in zip(bucket.params, norms, strict=True):
            shard, _ = self._placed[id(param)]
            piece = pieces.pop(id(param), None)
            if shard.number not in self._numbers_early:
                waiting += [piece] if piece is not None else []
                continue
            factor = self._factor(norm, *([self._previous_norm] if self._previous_norm is not None else []))
            gradient = None
            if piece is not None:
                gradient, piece.gradient = piece.gradient, piece.gradient.new_empty(0)
            bounded.setdefault(factor, []).extend(self._use(param, gradient, self._scale(factor)))
            del gradient
        self._hold(waiting)
        for factor, members in bounded.items():
            self._all_ranks(members, self._scale(factor))

    def _factor(self, *norms: float) -> float:
        """What a gradient is multiplied with, so that none of `norms` exceeds the clip."""
        clip = self.clip_grad
        return 1.0 / max(1.0, *((norm + 1e-6) / clip for norm in norms)) if clip > 0.0 else 1.0

    def _scale(self, factor: float) -> Tensor:
        return torch.full((), factor, device=self._shards[0].tensor.device)

    def _begun(self, shard: Shard) -> TensorStep | dict[int, Member]:
        """The step of a flat tensor, counted on all ranks, whoever has a part of it; by parameter where it is looked at
        as a whole, or has factored states."""
        if shard.number not in self._steps:
            begun = self._begin(shard)
            assert begun is not None
            self._steps[shard.number] = begun
            if self.optimizer.steps_together(self.optimizer.param_groups[shard.group]):
                members = whole_parameters(self.optimizer, shard, begun, lambda own: None)
                for member in members:
                    member.step = replace(begun)  # by itself: what lies between two of them is another bucket's
                params = (id(member.param) for member in shard.members)
                self._steps[shard.number] = dict(zip(params, members, strict=True))
        return self._steps[shard.number]

    def _use(self, param: Tensor, gradient: Tensor | None, scale: Tensor) -> list[Member]:
        """Update what this rank holds of a parameter with `gradient`, which is all of it; None: it holds none.

        Returns what has to be stepped together with all ranks.
        """
        shard, placed = self._placed[id(param)]
        begun, own = self._begun(shard), placed.fragment
        if isinstance(begun, TensorStep):
            if gradient is not None:
                at = placed.stepped
                begun.stream(at.start, at.stop, first_block=placed.first_block).apply(0, gradient, scale)
            return []
        member = begun[id(param)]
        if own is not None and gradient is not None:
            member.share = Share(own, gradient[: own.numel], placed.first_block)
        if member.step.function.rule.statistics:
            return [member]
        member.update(scale)
        return []

    def _all_ranks(self, members: Sequence[Member], scale: Tensor) -> None:
        if members:
            self._numbers = {**self._numbers, **step_together(members, scale, self._ranks)}

    def _finish(self) -> None:
        """Update what waited."""
        while self._measured:
            self._apply()
        norm = self._squares**0.5
        self.overflow = self._broken
        self._global_grad_norm = torch.tensor(float("inf") if self._broken else norm)
        if not self._broken:
            self._step_late(self._late, self._scale(self._factor(norm)))
            for shard in self._early:
                self._rest(shard)
            self.optimizer.found = {**self._numbers, **self.optimizer.found}
            self.optimizer.param_groups[0][RELEASED_NORM] = norm
        else:
            # A checkpoint has the state of all groups, or of none, and one count of steps: another number of ranks
            # puts the parameters of one tensor together from those of several. So all are counted if one has been.
            with nullcontext() if self._steps else self.optimizer.allocating():
                for shard in self._shards:
                    if shard.number not in self._steps:
                        self._begin(shard)
                    with_small(self.optimizer, shard)
        settle([factors for member in self._left() for factors in member.factors.values()], self._ranks)

    def _left(self) -> Iterator[Member]:
        """Whose factored states are settled at the end: what is stepped together settles its own."""
        for number in sorted(self._steps):
            begun = self._steps[number]
            if isinstance(begun, dict):
                yield from (one for one in begun.values() if not one.step.function.rule.statistics)

    def _rest(self, shard: Shard) -> None:
        """Parameters without gradient take a step with zeros, as they do without release."""
        self._begun(shard)
        nothing, together = self._scale(0.0), list[Member]()
        for member in shard.members:
            if id(member.param) not in self._seen:
                size = member.stepped.stop - member.stepped.start
                zeros = torch.zeros(size, dtype=member.param.dtype, device=nothing.device) if size else None
                together += self._use(member.param, zeros, nothing)
        self._all_ranks(together, nothing)


SPLIT = "supports neither mixture-of-experts layers under expert parallelism nor model parallelism nor MiCS"


def _refusal(zero: Any) -> str | None:
    """What gradients cannot be released with, or None; `toolkit.config` knows what a JSON says, sooner."""
    if found := waits_for(zero.optimizer.rules()):
        return f"does not fit a rule that looks at several parameters ({found}); leave it out"
    if zero.gradient_accumulation_dtype != zero.dtype:
        return "needs data_types.grad_accum_dtype to be that of the model; leave that out"
    if zero.dtype == torch.float16:
        return "cannot skip a whole step, as fp16 must for one gradient out of range; use bf16"
    return None
