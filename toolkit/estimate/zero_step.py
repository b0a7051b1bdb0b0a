"""What ZeRO holds on one rank during a step, on top of the rehearsed pass: weights, state, gradients, buckets.

Follows `toolkit.zero` for this package's rules, and DeepSpeed 0.19.8 (stage_1_and_2.py, stage3.py,
fp16/unfused_optimizer.py) for all other optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from toolkit.estimate.dry_run import Rehearsal
from toolkit.estimate.gather import gather
from toolkit.estimate.stored import Group, Stored
from toolkit.estimate.zero import Zero
from toolkit.memory.storages import Curve, Life, curve
from toolkit.records import categories as c
from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import held, shard_size
from toolkit.zero.gradients import NORM_CHUNK

_UNSHARDED_REDUCTION = 500_000_000
"""Elements that DeepSpeed's engine flattens at a time without ZeRO (engine.py, MEMORY_OPT_ALLREDUCE_SIZE)."""


@dataclass
class Step:
    """A simulated step of one rank: `curve` of the device, and what lies on the host and on NVMe, in bytes."""

    curve: Curve
    resident: dict[str, int]
    host: dict[str, int]
    nvme: dict[str, int]


def simulate(rehearsal: Rehearsal, zero: Zero, stored: Stored, *, dtype: torch.dtype, rank: int, on_gpu: bool) -> Step:
    """Put what ZeRO and the optimizer hold around a rehearsed pass.

    Args:
        rank: whose shards are held; the last one gets its gradients earliest in the backward pass.
        on_gpu: else host and device are one memory, and everything is on `curve`.
    """
    return _Simulation(rehearsal, zero, stored, dtype.itemsize, rank, on_gpu).run()


class _Simulation:
    def __init__(self, rehearsal: Rehearsal, zero: Zero, stored: Stored, width: int, rank: int, on_gpu: bool) -> None:
        self.rehearsal, self.zero, self.stored = rehearsal, zero, stored
        self.width, self.rank, self.on_gpu = width, rank, on_gpu
        # Only gradients live on differently under ZeRO; everything else is the rehearsal's own.
        self.lives = [life if life.parameter is None else replace(life) for life in rehearsal.tape.lives]
        self.host: dict[str, int] = {}
        self.nvme: dict[str, int] = {}
        self.unapplied: list[tuple[list[Life], int]] = []
        self.busy: list[Life] = []
        self.numels = [parameter.numel for parameter in rehearsal.parameters]
        self.total = sum(self.numels[number] for group in stored.groups for number in group.numbers)
        # The gradient that autograd made, by parameter.
        self.gradients = {life.parameter: life for life in self.lives if life.parameter is not None}
        for number, moment in rehearsal.arrivals:
            if number not in self.gradients:  # a part of something larger
                name = f"gradient of {rehearsal.parameters[number].name}"
                size = self.width * rehearsal.parameters[number].numel
                self.gradients[number] = Life(size, moment, moment + 1, c.BACKWARD, c.GRADIENTS, name)
                self.lives.append(self.gradients[number])
        # After the pass: the end of the reduction, then the step, a moment for each thing that it holds.
        self.last = rehearsal.tape.now - 1
        self.reduced = rehearsal.tape.now
        self.step = self.reduced + 1
        self.end = self.step + 1
        self.own = self._shares()

    # ---- small parts ----------------------------------------------------------------------------------------------

    def hold(self, size: float, category: str, what: str, born: int, died: int | None) -> Life:
        life = Life(round(size), born, died, self._phase(born), category, what)
        if life.bytes > 0:
            self.lives.append(life)
        return life

    def _phase(self, moment: int) -> str:
        if moment < 0:
            return c.INIT
        if moment >= self.reduced:
            return c.REDUCE if moment < self.step else c.STEP
        return next(name for name, start in reversed(self.rehearsal.tape.phases) if start <= moment)

    def store(self, size: float, category: str, what: str, place: str) -> None:
        """Hold for good, on the device, the host or NVMe."""
        if place == "nvme":
            self.nvme[category] = self.nvme.get(category, 0) + round(size)
        elif place == "cpu" and self.on_gpu:
            self.host[category] = self.host.get(category, 0) + round(size)
        else:
            self.hold(size, category, what, -1, None)

    def _shares(self) -> dict[int, int]:
        """Elements of each parameter's gradient that this rank keeps."""
        ranks = self.zero.world_size
        if self.zero.stage == 0 or ranks == 1:
            return dict(enumerate(self.numels))
        own: dict[int, int] = {}
        for group in self.stored.groups:
            if self.zero.stage == 3:
                own.update({number: -(-self.numels[number] // ranks) for number in group.numbers})
                continue
            size, start = self.group_share(group), 0
            for number in group.numbers:
                mine = held(self.rank, self.numels[number], size=size, shift=start)
                own[number] = mine.numel if mine is not None else 0
                start += self.numels[number]
        return own

    def group_share(self, group: Group) -> int:
        """Elements of `group` on one rank, padding included."""
        ranks, sizes = self.zero.world_size, [self.numels[number] for number in group.numbers]
        if self.zero.stage == 0:
            return sum(sizes)
        if self.zero.stage == 3:
            unit = BLOCK if group.whole_blocks or not self.stored.ours else 1
            return sum(shard_size(size, ranks, unit) for size in sizes)
        return shard_size(sum(sizes), ranks, BLOCK if self.stored.ours else 2)

    # ---- the step -------------------------------------------------------------------------------------------------

    def run(self) -> Step:
        zero = self.zero
        self._model_state()
        if zero.stage == 3:
            self._stage_3()
        elif zero.stage == 0:
            self._unsharded()
        elif self.stored.ours:
            self._sharded()
        else:
            self._stock()
        phases = [*self.rehearsal.tape.phases, (c.REDUCE, self.reduced), (c.STEP, self.step)]
        found = curve(self.lives, self.end, phases)
        kept = [life for life in self.lives if life.born < 0 and life.died is None]
        resident: dict[str, int] = {}
        for life in kept:
            assert life.category is not None
            resident[life.category] = resident.get(life.category, 0) + life.bytes
        return Step(found, {name: resident[name] for name in c.ordered(resident)}, self.host, self.nvme)

    def _model_state(self) -> None:
        zero, held_by = self.zero, {}
        for group in self.stored.groups:
            share = self.group_share(group)
            held_by.update(dict.fromkeys(group.numbers, group))
            for category, size in group.per_element.items():
                self.store(size * share, category, category, zero.optimizer_on)
            self.store(group.master * share, c.MASTER, "fp32 weights", zero.optimizer_on)
            # The step runs on the host, on its own copy of the weights, unless those are there anyway.
            on_host = zero.weights_on != "none" or (zero.stage == 3 and not self.on_gpu)
            if zero.optimizer_on != "none" and not group.master and not on_host:
                self.store(self.width * share, c.WEIGHTS, "weights to step on", zero.optimizer_on)
            if zero.stage == 3:
                self.store(self.width * share, c.WEIGHTS, "this rank's weights", zero.weights_on)
        for number, parameter in enumerate(self.rehearsal.parameters):
            if zero.stage < 3 or number not in held_by:
                self.hold(self.width * parameter.numel, c.WEIGHTS, parameter.name, -1, None)
        for name, buffer in self.rehearsal.model.named_buffers():
            self.hold(buffer.numel() * buffer.element_size(), c.WEIGHTS, name, -1, None)

    def staging(self, numel: int, moment: int) -> None:
        """Pieces of so many elements of gradients, of which the norm is taken, and that are joined."""
        if not self.on_gpu:
            self.hold(4 * min(NORM_CHUNK, numel), c.TRANSIENTS, "pieces of gradients", moment, moment + 1)

    def _unsharded(self) -> None:
        for number, _ in self.rehearsal.arrivals:
            self.gradients[number].died = self.end
            if self.zero.accumulation > 1:
                self._accumulated(number, self.numels[number] * self.width)
        size = self.width * min(self.total, _UNSHARDED_REDUCTION)
        self.hold(size, c.BUCKETS, "gradients, flattened", self.reduced, self.step)
        if self.width < 4:
            self.hold(4 * self.total, c.TRANSIENTS, "fp32 gradients", self.step, self.end)
        if self.stored.ours:
            self.staging(self.total, self.step)

    def _accumulated(self, number: int, size: float) -> Life:
        """What earlier micro-batches have summed up is there from the start; this one's is added to it."""
        return self.hold(size, c.GRADIENTS, f"gradient of {self.rehearsal.parameters[number].name}", -1, self.end)

    # ---- stages 1 and 2 -------------------------------------------------------------------------------------------

    def _sharded(self) -> None:
        """toolkit/zero/stage12.py and gradients.py."""
        zero = self.zero
        released = {number for group in self.stored.groups if group.released for number in group.numbers}
        waiting: list[int] = []
        for number, moment in self.rehearsal.arrivals:
            if zero.stage == 1 and zero.accumulation > 1:
                # Autograd adds this micro-batch's gradient to what is there.
                self.gradients[number] = self._accumulated(number, self.width * self.numels[number])
            if zero.world_size == 1 and zero.optimizer_on == "none":
                if number not in released and (zero.stage == 1 or zero.accumulation == 1):
                    self.gradients[number].died = self.end
                elif number not in released:
                    self._accumulated(number, self.width * self.numels[number])
                else:
                    self._apply_later([self.gradients[number]], self.numels[number], moment)
                    self.staging(self.numels[number], moment)
                continue
            if self.numels[number] >= zero.reduce_bucket and waiting:
                self._flush(waiting, moment, released)
                moment += 2
            waiting.append(number)
            full = sum(self.numels[n] for n in waiting) >= zero.reduce_bucket
            if full or zero.world_size == 1:
                self._flush(waiting, moment, released)
            else:
                self.gradients[number].died = self.reduced
        self._flush(waiting, self.last, released)
        if zero.optimizer_on != "none":
            share = sum(self.group_share(group) for group in self.stored.groups)
            self.store(self.width * share, c.GRADIENTS, "gradients to step on", "cpu")
        self.staging(self.total, self.step)

    def _flush(self, waiting: list[int], moment: int, released: set[int]) -> None:
        """Reduce what is waiting: parts of one owner that lie apart are joined, what is not this rank's is freed."""
        if not waiting:
            return
        self._finish(moment)
        joined = len(waiting) > 1 and self.zero.world_size > 1
        if joined:
            others = self.width * sum(self.numels[number] - self.own[number] for number in waiting)
            self.busy.append(self.hold(others, c.BUCKETS, "gradients that are reduced together", moment, moment + 1))
        unapplied: list[Life] = []
        for number in waiting:
            self.gradients[number].died = moment + 1
            if not joined and self.own[number] < self.numels[number]:
                self.busy.append(self.gradients[number])
            name = f"gradient of {self.rehearsal.parameters[number].name}"
            size = self.width * self.own[number]
            if number in released and self.on_gpu:
                alone = not joined and self.own[number] == self.numels[number]
                held = self.gradients[number] if alone else self.hold(size, c.GRADIENTS, name, moment, moment + 1)
                unapplied.append(held)
                continue
            goes = number in released or self.zero.optimizer_on != "none"
            if self.zero.world_size == 1 or (goes and not joined):
                continue
            # A copy: what was joined, or cut out of a gradient of which other ranks have parts.
            adds = not goes and self.zero.accumulation > 1 and self.zero.stage == 2
            if adds:
                self._accumulated(number, size)
            if number in released:
                self.staging(self.numels[number], moment)
            if goes or adds:
                self.hold(size, c.BUCKETS, name, moment, moment + 1)
            else:
                self.hold(size, c.GRADIENTS, name, moment, self.end)
        self._apply_later(unapplied, sum(self.own[number] for number in waiting), moment)
        if self.zero.overlap:
            for life in self.busy:
                life.died = self.reduced
        else:
            self.busy.clear()
        waiting.clear()

    def _finish(self, moment: int) -> None:
        """With overlap the reduction of a bucket, and what it needs, lasts until the next bucket is full."""
        for life in self.busy:
            life.died = max(life.born + 1, moment)
        self.busy.clear()

    def _apply_later(self, released: list[Life], elements: int, moment: int) -> None:
        """toolkit/zero/release.py: on a GPU a bucket of gradients waits for its norms."""
        for life in released:
            life.died = self.end if self.on_gpu else moment + 1
        if not self.on_gpu:
            return
        self.unapplied.append((released, elements))
        while len(self.unapplied) > 1 and sum(size for _, size in self.unapplied) > self.zero.reduce_bucket:
            for life in self.unapplied.pop(0)[0]:
                life.died = moment + 1

    def _stock(self) -> None:
        """DeepSpeed's stage_1_and_2.py, contiguous_gradients."""
        zero = self.zero
        share = sum(self.group_share(group) for group in self.stored.groups)
        waiting: list[int] = []
        first = min((moment for _, moment in self.rehearsal.arrivals), default=self.reduced)
        copies = 2 if zero.overlap else 1
        self.hold(self.width * zero.reduce_bucket * copies, c.BUCKETS, "reduction bucket", first, self.step)
        kept = self.last  # from the first reduction of something that this rank keeps
        for number, moment in self.rehearsal.arrivals:
            if zero.stage == 1 and zero.accumulation > 1:
                self._accumulated(number, self.width * self.numels[number])
                continue
            numel = self.numels[number]
            # It is copied into the bucket, after what is there has made room.
            self.gradients[number].died = moment + 2
            if sum(self.numels[n] for n in waiting) + numel > zero.reduce_bucket:
                if any(self.own[n] for n in waiting):
                    kept = min(kept, moment + 1)
                self._reduce_bucket(waiting, moment)
            if numel > zero.reduce_bucket:
                kept = min(kept, moment) if self.own[number] else kept
            else:
                waiting.append(number)
        self._reduce_bucket(waiting, self.last)
        offloaded = zero.optimizer_on != "none"
        if offloaded:
            self.store(4 * share, c.GRADIENTS, "fp32 gradients to step on", "cpu")
            largest = max(self.numels)
            self.store(self.width * largest, c.BUCKETS, "staging buffer", "none")
            self.store(self.width * largest, c.BUCKETS, "staging buffer", "cpu")
            self.store(self.width * share, c.BUCKETS, "weights on their way back", "cpu")
            return
        self.hold(self.width * share, c.GRADIENTS, "this rank's gradients", kept, self.end)
        if zero.accumulation > 1 and zero.stage == 2:
            # A micro-batch's gradients have a buffer of their own, and are added to the earlier ones' at its end.
            self.hold(self.width * share, c.GRADIENTS, "gradients of earlier micro-batches", -1, self.step)
        self.hold(self.width * share, c.TRANSIENTS, "gradients, flattened", self.step, self.step + 1)
        self.hold(4 * share, c.TRANSIENTS, "fp32 gradients", self.step, self.end)
        self.end = self.step + 2
        self.hold(self.stored.step_per_element * share, c.TRANSIENTS, "the step's own", self.step + 1, self.end)

    def _reduce_bucket(self, waiting: list[int], moment: int) -> None:
        if waiting and self.zero.world_size > 1:
            size = self.width * sum(self.numels[number] for number in waiting)
            self.hold(size, c.BUCKETS, "gradients that are reduced together", moment, moment + 1)
        waiting.clear()

    # ---- stage 3 --------------------------------------------------------------------------------------------------

    def _stage_3(self) -> None:
        """DeepSpeed's stage3.py, and toolkit/zero/stage3.py, whose step uses gradients where they lie."""
        zero = self.zero
        share = sum(self.group_share(group) for group in self.stored.groups)
        self.hold(self.width * zero.reduce_bucket, c.BUCKETS, "reduction bucket", -1, None)
        offloaded = zero.optimizer_on != "none"
        self.store(self.width * share, c.GRADIENTS, "this rank's gradients", "cpu" if offloaded else "none")
        if zero.world_size > 1 or zero.weights_on != "none":
            gather(
                self.rehearsal,
                [self.width * numel for numel in self.numels],
                self.numels,
                zero.limits,
                self.hold,
                copies=zero.world_size > 1,
                gloo=not self.on_gpu,
            )
        waiting: list[int] = []
        for number, moment in self.rehearsal.arrivals:
            numel = self.numels[number]
            if waiting and sum(self.numels[n] for n in waiting) + numel > zero.reduce_bucket:
                self._scatter(waiting, moment)
            waiting.append(number)
            self.gradients[number].died = moment + 1 if numel <= zero.reduce_bucket else self.step
        self._scatter(waiting, self.last)
        if self.stored.ours:
            self.staging(self.total, self.step)
            return
        if offloaded:
            self.store(4 * share, c.GRADIENTS, "fp32 gradients to step on", zero.optimizer_on)
            return
        largest = self._largest_sub_group()
        self.hold(self.width * largest, c.TRANSIENTS, "gradients of a sub-group, flattened", self.step, self.end)
        self.hold(4 * largest, c.TRANSIENTS, "fp32 gradients of a sub-group", self.step, self.end)
        self.hold(self.stored.step_per_element * largest, c.TRANSIENTS, "the step's own", self.step, self.end)

    def _scatter(self, waiting: list[int], moment: int) -> None:
        if not waiting:
            return
        size = self.width * sum(self.numels[number] for number in waiting)
        if len(waiting) > 1 or self.numels[waiting[0]] % self.zero.world_size:
            self.hold(size, c.BUCKETS, "gradients that are reduced together", moment, moment + 1)
        if self.on_gpu:
            self.hold(size / self.zero.world_size, c.BUCKETS, "result of the reduction", moment, moment + 1)
        else:
            # gloo has no reduce-scatter: it sums a copy of everything.
            self.hold(size, c.TRANSIENTS, "gradients that are reduced together, gloo's copy", moment, moment + 1)
        for number in waiting:
            if self.gradients[number].died == self.step:  # too large for the bucket
                self.gradients[number].died = moment + 1
        waiting.clear()

    def _largest_sub_group(self) -> int:
        largest = 0
        for group in self.stored.groups:
            size = 0
            for number in group.numbers:
                size += -(-self.numels[number] // self.zero.world_size)
                if size >= self.zero.sub_group:
                    largest, size = max(largest, size), 0
            largest = max(largest, size)
        return largest
