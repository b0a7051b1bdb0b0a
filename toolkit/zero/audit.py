"""The audit at the start of a training: is each trainable parameter in one group of the optimizer, and does it move?

A parameter that nothing trains shows in no loss curve: weight decay moves it without a gradient, and of a gradient that
the optimizer never uses nobody hears. So both are looked at, over whole parameters, during the first steps and not
after: the largest gradient that autograd brings, and a checksum of what the optimizer trains, remainders of bf16
weights included. Neither makes a copy of a parameter.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from toolkit.errors import UserError, some
from toolkit.optim import find_rule
from toolkit.printable import warn_once
from toolkit.state.sharding import Fragment, whole_shape
from toolkit.zero.access import values
from toolkit.zero.gradients import NORM_CHUNK
from toolkit.zero.shards import are_shards, members, trained_groups

logger = logging.getLogger("toolkit")

WATCHED = 4
"""Steps that a parameter has to move in: a zero that others are multiplied with, as in LoRA, keeps gradients away in
the first, and not every expert is used in each."""
_ON_A_DEVICE = 2**20
"""Elements at a time of a checksum there; on a CPU `NORM_CHUNK`."""


class _Gradients:
    """A hook of a parameter; it does not hold that.

    `largest`: the largest absolute value of this rank's gradients so far, 0-d; None: autograd has brought none.
    """

    largest: Tensor | None = None

    def __call__(self, gradient: Tensor) -> None:
        found = gradient.detach()._values() if gradient.is_sparse else gradient.detach()
        if found.numel():
            largest = torch.linalg.vector_norm(found, float("inf")).float()  # in a wider type it would take a copy
            self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)


@dataclass
class _Watched:
    """A trainable parameter, and what has been seen of it; `before`: checksums of what this rank trains of it."""

    name: str
    param: Any
    hook: Any
    gradients: _Gradients
    before: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def begin(cls, name: str, param: Any) -> _Watched:
        gradients = _Gradients()
        return cls(name, param, param.register_hook(gradients), gradients)


class Audit:
    """Watches an engine's first steps; `line` has what was found.

    Args:
        engine: DeepSpeed's, with its optimizer made.
        handed_over: the optimizer that the caller gave, or None.

    Raises:
        UserError: another optimizer runs than the one that was asked for.
    """

    line: str | None = None
    """What was found, as of the latest step that was looked at; None before the first."""
    _told: str | None = None

    def __init__(self, engine: Any, handed_over: Any) -> None:
        self._optimizer = _running(engine, handed_over)
        named = dict(engine.module.named_parameters())
        trainable = {name: p for name, p in named.items() if p.requires_grad and whole_shape(p).numel()}
        self._frozen = sum(not p.requires_grad for p in named.values())
        self._parameters, self._tensors = sum(whole_shape(p).numel() for p in trainable.values()), len(trainable)
        times = Counter(id(param) for group in trained_groups(engine.optimizer) for param in group)
        assert max(times.values(), default=1) == 1  # else `param_groups`, or DeepSpeed, has refused it
        self._missing = [name for name, param in trainable.items() if not times[id(param)]]
        if self._missing:
            warn_once(
                logger,
                "%s: trainable, but in no group of the optimizer, and will not be trained; hand them over with the "
                "others, or set requires_grad to False",
                some(self._missing, 8),
            )
        self._watched = [_Watched.begin(name, param) for name, param in trainable.items() if times[id(param)]]
        self._steps = 0
        self.accept(engine)

    def accept(self, engine: Any) -> None:
        """What the parameters are now is where they start: weights were loaded."""
        if self._watched:
            found = _checksums(engine.optimizer, [one.param for one in self._watched])
            for one, before in zip(self._watched, found, strict=True):
                one.before = before

    def look(self, engine: Any, rates: Sequence[float]) -> None:
        """To be called after each step with the rates that it had, on every rank."""
        if not self._watched or not engine.was_step_applied() or not any(rates):
            return
        self._steps += 1
        gradients, moved = self._found(engine)
        idle = [one for one, largest in zip(self._watched, gradients, strict=True) if not largest]
        held = [
            one
            for one, largest, changed in zip(self._watched, gradients, moved, strict=True)
            if largest and changed == 0
        ]
        kept = {id(one) for one in (*idle, *held)}
        for one in self._watched:
            if id(one) not in kept:
                one.hook.remove()
        self._watched = [one for one in self._watched if id(one) in kept]
        self.line = self._words(idle, held, engine.global_steps)
        logger.info(self.line)
        if self._steps == WATCHED:
            self._warn(idle, held)
            for one in self._watched:
                one.hook.remove()
            self._watched = []

    def news(self) -> str | None:
        """`line`, if it has changed since this was asked last."""
        told, self._told = self._told, self.line
        return self.line if self.line != told else None

    def _found(self, engine: Any) -> tuple[list[float], list[float]]:
        """Of each watched parameter the largest gradient (0: none came) and whether it changed, over all ranks.

        1: it did, 0: it did not, -1: it could not be looked at.
        """
        now = _checksums(engine.optimizer, [one.param for one in self._watched])
        none = torch.full((), -1.0, device=engine.device)  # MAX over ranks lets all else count
        largest = [one.gradients.largest for one in self._watched]
        gradients = [none if value is None else value.to(engine.device) for value in largest]
        changed = [
            (one.before != new).any().float().to(engine.device) if new.numel() else none
            for one, new in zip(self._watched, now, strict=True)
        ]
        both = torch.stack([torch.stack(gradients), torch.stack(changed)])
        group = engine.seq_data_parallel_group
        if dist.get_world_size(group) > 1:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        [found, moved] = both.tolist()
        for one, value in zip(self._watched, found, strict=True):
            one.gradients.largest = None if value < 0 else torch.full((), value, device=engine.device)
        return [max(value, 0.0) for value in found], moved

    def _words(self, idle: Sequence[_Watched], held: Sequence[_Watched], step: int) -> str:
        frozen = f" ({self._frozen} more are frozen)" if self._frozen else ""
        outside = f", but {len(self._missing)} in none" if self._missing else ""
        words = f"audit: {self._parameters:,} parameters in {self._tensors} tensors{frozen}, each in one group{outside}"
        if not idle and not held and not self._missing:
            return f"{words}, moved by step {step}; optimizer {self._optimizer}"
        moved = self._tensors - len(self._missing) - len(idle) - len(held)
        words += f"; {moved} moved by step {step}"
        never = [one for one in idle if one.gradients.largest is None]
        zeros = [one for one in idle if one.gradients.largest is not None]
        for found, what in (
            (never, "without a gradient"),
            (zeros, "whose gradient is zero"),
            (held, "with a gradient, but unchanged"),
        ):
            if found:
                words += f"; {len(found)} {what} so far: {some([one.name for one in found], 3)}"
        return f"{words}; optimizer {self._optimizer}"

    def _warn(self, idle: Sequence[_Watched], held: Sequence[_Watched]) -> None:
        never = [one.name for one in idle if one.gradients.largest is None]
        zeros = [one.name for one in idle if one.gradients.largest is not None]
        # Of half precision a small step may leave nothing.
        exact = [one.name for one in held if one.param.dtype == torch.float32]
        for names, what in (
            (never, "no gradient came in %d steps: no loss depends on them, and weight decay alone trains them"),
            (zeros, "the gradient was zero in %d steps: unused experts, or something multiplies them by zero"),
            (
                exact,
                "not changed in %d steps though there is a gradient: their rate is 0 or too small",
            ),
        ):
            if names:
                warn_once(logger, f"%s: {what}", some(names, 8), WATCHED)


def _running(engine: Any, handed_over: Any) -> str:
    """The optimizer that runs, in words."""
    asked = (engine._config._param_dict.get("optimizer") or {}).get("type")
    runs, rule = type(engine.basic_optimizer), find_rule(asked) if asked else None
    if asked and handed_over is not None:
        warn_once(
            logger,
            "optimizer.type is %s, but an optimizer was handed over, which runs in its place: %s",
            asked,
            runs.__name__,
        )
    elif rule is not None and runs is not rule:
        raise UserError(f"optimizer.type is {asked}, but {runs.__name__} runs.")
    if asked and handed_over is None and asked.lower() != runs.__name__.lower():
        return f"{runs.__name__} (optimizer.type {asked})"
    return runs.__name__


# ---- checksums ------------------------------------------------------------------------------------------------------


def _checksums(optimizer: Any, params: Sequence[Any]) -> list[Tensor]:
    """Of each parameter, one number for every so many of the elements that this rank trains; one bit changes it.

    All are in one tensor that is there before: one of its own for each, made while what it is the sum of is held, would
    keep a hole in the C library's heap for each piece, of a gigabyte together where there are 150M parameters.
    """
    most = sum(-(-whole_shape(param).numel() // NORM_CHUNK) for param in params)
    made: dict[torch.device, tuple[Tensor, Tensor]] = {}
    places: dict[int, tuple[Tensor, int, int]] = {}
    at: Counter[torch.device] = Counter()
    for param, part in _trained(optimizer, {id(param) for param in params}):
        if part.device not in made:
            seeded = torch.Generator().manual_seed(0)
            odd = torch.randint(2**62, (NORM_CHUNK if part.is_cpu else _ON_A_DEVICE,), generator=seeded) | 1
            made[part.device] = odd.to(part.device), torch.empty(most, dtype=torch.int64, device=part.device)
        (factors, sums), number = made[part.device], at[part.device]
        bits = part.view(torch.int32).long()
        torch.sum(bits.mul_(factors[: bits.numel()]), dim=0, out=sums[number])  # modulo 2^64: exact
        places[id(param)] = sums, places.get(id(param), (sums, number))[1], number + 1
        at[part.device] += 1
    found = []
    for param in params:
        sums, start, stop = places.get(id(param), (torch.empty(0), 0, 0))
        found.append(sums[start:stop])
    return found


@torch.no_grad()
def _trained(optimizer: Any, wanted: set[int]) -> Iterator[tuple[Any, Tensor]]:
    """Parameters among `wanted` and what this rank trains of them, fp32, flat, a piece at a time."""
    if not are_shards(optimizer):
        for group in trained_groups(optimizer):
            for param in group:
                if id(param) in wanted:
                    for piece in param.detach().reshape(-1).split(NORM_CHUNK if param.is_cpu else _ON_A_DEVICE):
                        yield param, piece.float()
        return
    for shard, member in members(optimizer):
        own = member.fragment
        if own is None or id(member.param) not in wanted or shard.tensor.numel() < own.offset + own.numel:
            continue  # the last: on NVMe
        size = NORM_CHUNK if shard.tensor.is_cpu else _ON_A_DEVICE
        for start in range(own.start, own.stop, size):
            stop, offset = min(start + size, own.stop), own.offset + start - own.start
            yield member.param, values(optimizer, shard, Fragment(own.rank, start, stop, offset))
