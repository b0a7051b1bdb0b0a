"""`release_gradients`: each bucket of gradients is reduced, applied and freed during the backward pass.

The global norm is known only when all gradients are there, and then they would all have to be held. So a gradient is
scaled by the smallest of

* 1,
* clip / (global norm of the previous step), once there is one,
* clip / (norm of this parameter's gradient), which no exact clipping would exceed, since the global norm is larger.

The last one bounds what a sudden spike can do, the second follows the usual size of gradients. A gradient that is not
finite, and all that come after it in that step, are not applied, and the step counts as skipped; what was applied
before stays.

The host decides that, and a device would stand still if the host waited for each norm as soon as it is asked for. So
on a device up to a bucket of gradients waits for their norms, with the backward pass queued behind them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim import RuleOptimizer
from toolkit.optim.factored import settle
from toolkit.optim.rule import looks_at
from toolkit.optim.statistics import Member, Share
from toolkit.optim.streaming import StreamedStep
from toolkit.state.codecs import BLOCK
from toolkit.zero.exchange import whole_parameters, with_small
from toolkit.zero.gradients import GradientFragment, HostCopy, squared_norms
from toolkit.zero.shards import Shard
from toolkit.zero.stage12 import ShardedZeroOptimizer, gather_weights

RELEASED_NORM = "released_norm"
"""Key in the first parameter group of the norm that the next step is clipped by; checkpoints keep it."""


@dataclass(frozen=True)
class _Measured:
    """A bucket on its way: this rank's pieces, and the squared norm of the whole gradient of each of `params`, fp64."""

    params: Sequence[Tensor]
    pieces: list[GradientFragment]
    squares: HostCopy

    @property
    def elements(self) -> int:
        return sum(piece.gradient.numel() for piece in self.pieces)


class ReleasingZeroOptimizer(ShardedZeroOptimizer):
    """Stages 1 and 2 with `release_gradients`, for one micro-batch a step in bf16 or fp32.

    Groups whose parameters are not all whole blocks (norms; they are small) are updated at the end of the step.
    Of factored states a step uses rows and columns as they were before it: parts of a matrix wait for no others.
    """

    def __init__(self, init_optimizer: RuleOptimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(init_optimizer, *args, **kwargs)
        refusal = _refusal(self)
        if refusal:
            raise UserError(f"optimizer.params.release_gradients {refusal}")
        self._delays = not get_accelerator().is_synchronized_device()
        self._placed = {id(member.param): (shard, member) for shard in self._shards for member in shard.members}
        self._whole = [all(member.shape.numel() % BLOCK == 0 for member in shard.members) for shard in self._shards]
        self._start()

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
        self._steps: dict[int, StreamedStep | dict[int, Member]] = {}
        self._measured: deque[_Measured] = deque()

    def _deliver(self, params: Sequence[Tensor], pieces: list[GradientFragment]) -> None:
        for param in params:
            if id(param) in self._seen:
                raise UserError(
                    "optimizer.params.release_gradients needs the whole gradient of a parameter at once, but "
                    f"{self.param_names.get(param, 'one')} got a second part (reentrant activation checkpointing or "
                    "several backward passes in a step); leave it out"
                )
            self._seen.add(id(param))
        self._measured.append(_Measured(params, pieces, HostCopy(self._squared_norms(params, pieces))))
        if not self._delays:
            self._apply()
        while len(self._measured) > 1 and sum(bucket.elements for bucket in self._measured) > self.reduce_bucket_size:
            self._apply()

    def _squared_norms(self, params: Sequence[Tensor], pieces: list[GradientFragment]) -> Tensor:
        """Of the whole gradient of each parameter, fp64, the same on every rank."""
        mine = {}
        if pieces:  # of a parameter a rank has one piece, or none
            squares = squared_norms([piece.gradient for piece in pieces])
            mine = {id(piece.param): square for piece, square in zip(pieces, squares, strict=True)}
        nothing = torch.zeros((), dtype=torch.float64, device=get_accelerator().current_device_name())
        return self._ranks.add(torch.stack([mine.get(id(param), nothing) for param in params]))

    @property
    def _unapplied(self) -> list[Tensor]:
        """Gradients that wait for their norms, for the memory ledger."""
        return [piece.gradient for bucket in self._measured for piece in bucket.pieces]

    def _apply(self) -> None:
        """Use the gradients that wait longest."""
        bucket = self._measured.popleft()
        norms = dict(zip(map(id, bucket.params), bucket.squares.wait().sqrt().tolist(), strict=True))
        self._squares += sum(norm**2 for norm in norms.values())
        self._broken |= not all(norm < float("inf") for norm in norms.values())
        waiting = []
        if not self._broken:  # a step of a group is counted on all ranks, whoever has a piece of it
            for param in bucket.params:
                shard, _ = self._placed[id(param)]
                if self._whole[shard.group]:
                    self._begun(shard)
        for piece in bucket.pieces:
            if self._broken:
                continue
            if not self._whole[piece.group]:
                piece.gradient = piece.gradient.clone()  # a view would keep the whole bucket until then
                waiting.append(piece)
                continue
            known = [norms[id(piece.param)]] + ([self._previous_norm] if self._previous_norm is not None else [])
            self._use(piece.param, piece.gradient, self._factor(*known))
            piece.gradient = piece.gradient[:0]
        super()._deliver(bucket.params, waiting)

    def _factor(self, *norms: float) -> Tensor:
        """What a gradient is multiplied with, so that none of `norms` exceeds the clip."""
        clip = self.clip_grad
        factor = 1.0 / max(1.0, *((norm + 1e-6) / clip for norm in norms)) if clip > 0.0 else 1.0
        return torch.full((), factor, device=self._shards[0].tensor.device)

    def _begun(self, shard: Shard) -> StreamedStep | dict[int, Member]:
        """The step of a group, as far as it has come; one of factored states by parameter."""
        if shard.group not in self._steps:
            begun = self._begin(shard)
            assert begun is not None
            if self.optimizer.steps_together(self.optimizer.param_groups[shard.group]):
                members = whole_parameters(self.optimizer, shard, begun, lambda own: None)
                params = (id(member.param) for member in shard.members)
                self._steps[shard.group] = dict(zip(params, members, strict=True))
            else:
                self._steps[shard.group] = begun.stream(first_block=shard.first_block)
        return self._steps[shard.group]

    def _use(self, param: Tensor, gradient: Tensor, factor: Tensor) -> None:
        """Update what this rank holds of a parameter, all of it."""
        shard, placed = self._placed[id(param)]
        own, begun = placed.fragment, self._begun(shard)
        assert own is not None
        assert own.numel == gradient.numel()
        if isinstance(begun, StreamedStep):
            begun.apply(own.offset, gradient, factor)
        else:
            begun[id(param)].share = Share(own, gradient, placed.first_block)
            begun[id(param)].update(factor)

    def _publish(self) -> None:
        """Most gradients are gone; there is nothing to show."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update what waited, and gather the weights."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        while self._measured:
            self._apply()
        norm = self._squares**0.5
        self.overflow = self._broken
        self._global_grad_norm = torch.tensor(float("inf") if self._broken else norm)
        if not self._broken:
            late = [shard for shard, whole in zip(self._shards, self._whole, strict=True) if not whole]
            self._step_groups(late, self._factor(norm))
            for shard, whole in zip(self._shards, self._whole, strict=True):
                if whole:
                    self._rest(shard)
            self.optimizer.param_groups[0][RELEASED_NORM] = norm
        else:
            with self.optimizer.allocating():  # a checkpoint has the state of all groups, or of none
                for shard in self._shards:
                    self._begin(shard)
                    with_small(self.optimizer, shard)
        by_param = [self._steps[number] for number in sorted(self._steps)]
        members = [member for one in by_param if isinstance(one, dict) for member in one.values()]
        settle([factors for member in members for factors in member.factors.values()], self._ranks)
        self._discard()
        for shard in self._shards:
            self._show(shard)
        gather_weights(self, self._shards)
        self._start()

    def _rest(self, shard: Shard) -> None:
        """Parameters without gradient take a step with zeros, as they do without release."""
        zero_scale = torch.zeros((), device=shard.tensor.device)
        self._begun(shard)
        for member in shard.members:
            own = member.fragment
            if own is not None and id(member.param) not in self._seen:
                zeros = torch.zeros(own.numel, dtype=member.param.dtype, device=zero_scale.device)
                self._use(member.param, zeros, zero_scale)


def _refusal(zero: ShardedZeroOptimizer) -> str | None:
    """What `toolkit.config` cannot know that gradients cannot be released with, or None."""
    if found := looks_at(zero.optimizer.rules()):
        return f"does not fit a rule that looks at whole parameters ({found}); leave it out"
    if zero.gradient_accumulation_dtype != zero.dtype:
        return "needs data_types.grad_accum_dtype to be that of the model; leave that out"
    if zero.has_moe_layers or zero.model_parallel_world_size > 1:
        return "supports neither mixture-of-experts layers under expert parallelism nor model parallelism"
    return None
