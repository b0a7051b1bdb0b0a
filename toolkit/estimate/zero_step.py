"""What ZeRO holds on one rank during a step, on top of the pass of the dry run: weights, state, gradients, buckets.

Follows `toolkit.zero` for this package's rules, and DeepSpeed 0.19.8 (stage_1_and_2.py, stage3.py,
fp16/unfused_optimizer.py) for all other optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.config import DeepSpeedSettings
from toolkit.config.batch import Batch
from toolkit.estimate.dry_run import DryRun
from toolkit.estimate.gather import gather, sent
from toolkit.estimate.optimizer_memory import OptimizerMemory
from toolkit.estimate.simulation import Simulation
from toolkit.memory.storages import Curve, Lifetime, curve
from toolkit.records import categories as c
from toolkit.state.sharding import Fragment, fragments
from toolkit.zero.wire import ALL_GATHER, ALL_REDUCE, BROADCAST, REDUCE, REDUCE_SCATTER

_UNSHARDED_REDUCTION = 500_000_000
"""Elements that DeepSpeed's engine flattens at a time without ZeRO (engine.py, MEMORY_OPT_ALLREDUCE_SIZE)."""


@dataclass
class Step:
    """A simulated step of one rank: `curve` of the device, and what lies on the host and on NVMe, in bytes.

    `sent`: what it sends in the step for whole matrices. `wire`: what it puts into collectives for gradients and
    weights, by kind (`toolkit.zero.wire`); None where that is not known, for optimizers that are not this package's.
    """

    curve: Curve
    resident: dict[str, int]
    host: dict[str, int]
    nvme: dict[str, int]
    sent: int
    wire: dict[str, int] | None


def simulate(
    dry_run: DryRun, ds: DeepSpeedSettings, optimizer: OptimizerMemory, batch: Batch, *, rank: int, on_gpu: bool
) -> Step:
    """Put what ZeRO and the optimizer hold around the pass of a dry run.

    Args:
        rank: whose shards are held; the last one gets its gradients earliest in the backward pass.
        on_gpu: else host and device are one memory, and everything is on `curve`.
    """
    return _Simulation(dry_run, ds, optimizer, batch, rank, on_gpu).run()


class _Simulation(Simulation):
    gathered: list[list[int]] = []
    """At stage 3, the parameters that a pass gathers, as often as it does, and beside which others."""

    # ---- the step -------------------------------------------------------------------------------------------------

    def run(self) -> Step:
        self._model_state()
        if self.ds.stage == 3:
            self._stage_3()
        elif self.ds.stage == 0:
            self._unsharded()
        elif self.optimizer.ours:
            self._own_stages_1_and_2()
        else:
            self._deepspeed_stages_1_and_2()
        self.opening()
        if self.most_waiting:
            self.allocate_resident(self.most_waiting, c.GRADIENTS, "gradients that wait for their norms", "cpu")
        phases = [*self.dry_run.storages.phases, (c.REDUCE, self.reduced), (c.STEP, self.step)]
        self.step_together()
        found = curve(self.lifetimes, self.end, phases, self.dry_run.others)
        resident = c.bytes_by_category(
            (x.category or c.OTHER, x.bytes) for x in self.lifetimes if x.allocated_at < 0 and x.freed_at is None
        )
        return Step(found, resident, self.host, self.nvme, self.sent, self._wire())

    def _wire(self) -> dict[str, int] | None:
        """Of gradients and weights, padding included; norms, counts of experts' tokens and the like are a few bytes."""
        if self.world_size == 1:
            return {}
        if not self.optimizer.ours:
            return None
        if self.ds.stage == 0:
            return {ALL_REDUCE: self.width * self.total}
        padded = sum(self.group_share(group) for group in self.optimizer.groups) * self.world_size
        # toolkit/zero/lending.py
        gather, scatter = (ALL_GATHER, REDUCE_SCATTER) if self.on_gpu else (BROADCAST, ALL_REDUCE)
        if self.ds.stage == 3:
            kept = [number for number, numel in enumerate(self.numels) if numel <= self.buckets.persistent]
            weights = sum(
                sent(numbers, self.numels, self.padded, self.world_size, on_gpu=self.on_gpu)
                for numbers in (*self.gathered * self.accumulation, kept)
            )
            return {gather: self.width * weights, scatter: self.width * padded * self.accumulation}
        often = self.accumulation if self.ds.stage == 2 else 1
        return {gather: self.width * padded, REDUCE: self.width * self.total * often}

    def _model_state(self) -> None:
        group_of = {}
        offloaded = self.ds.offload_optimizer
        # Rules have what they keep of each element on NVMe, and the rest on the host.
        beside = "cpu" if offloaded == "nvme" and self.optimizer.ours else offloaded
        for group in self.optimizer.groups:
            share = self.group_share(group)
            group_of.update(dict.fromkeys(group.numbers, group))
            for category, size in group.per_element.items():
                self.allocate_resident(size * share, category, category, offloaded)
            for category, size in group.whole.items():
                self.allocate_resident(size, category, category, beside)
            self.allocate_resident(group.master * share, c.MASTER, "fp32 weights", beside)
            # The step runs on the host, on its own copy of the weights, unless those are there anyway.
            on_host = self.ds.offload_param != "none" or (self.ds.stage == 3 and not self.on_gpu)
            if offloaded != "none" and not group.master and not on_host:
                self.allocate_resident(self.width * share, c.WEIGHTS, "weights to step on", beside)
            if self.ds.stage == 3:
                self.allocate_resident(self.width * share, c.WEIGHTS, "this rank's weights", self.ds.offload_param)
        for number, parameter in enumerate(self.dry_run.parameters):
            if self.ds.stage < 3:
                self.allocate(self.width * parameter.numel, c.WEIGHTS, parameter.name, -1, None)
            elif number not in group_of:  # frozen
                share = self.padded[number] // self.world_size
                self.allocate_resident(self.width * share, c.WEIGHTS, parameter.name, self.ds.offload_param)
        for name, buffer in self.dry_run.model.named_buffers():
            self.allocate(buffer.numel() * buffer.element_size(), c.WEIGHTS, name, -1, None)

    def _unsharded(self) -> None:
        for number, _ in self.dry_run.arrivals:
            self.gradients[number].freed_at = self.end
            if self.accumulation > 1:
                self.accumulated(number, self.numels[number] * self.width)
        size = self.width * min(self.total, _UNSHARDED_REDUCTION)
        self.allocate(size, c.BUCKETS, "gradients, flattened", self.reduced, self.step)
        if self.width < 4:
            self.allocate(4 * self.total, c.TRANSIENTS, "fp32 gradients", self.step, self.end)
        if self.optimizer.ours:
            self.staging(self.total, self.step)

    # ---- stages 1 and 2 -------------------------------------------------------------------------------------------

    def _own_stages_1_and_2(self) -> None:
        """toolkit/zero/stage12.py and gradients.py."""
        released = self.optimizer.released
        waiting: list[int] = []
        for number, moment in self.dry_run.arrivals:
            if self.ds.stage == 1 and self.accumulation > 1:
                # Autograd adds this micro-batch's gradient to what is there.
                self.gradients[number] = self.accumulated(number, self.width * self.numels[number])
            if self.world_size == 1 and self.ds.offload_optimizer == "none":
                if number not in released and (self.ds.stage == 1 or self.accumulation == 1):
                    self.gradients[number].freed_at = self.end
                elif number not in released:
                    self.accumulated(number, self.width * self.numels[number])
                else:
                    self.use_released(moment, [number])
                    self._apply_later([self.gradients[number]], self.numels[number], moment, self.numels[number])
                continue
            if self.numels[number] >= self.buckets.reduce and waiting:
                self._flush(waiting, moment, released)
                moment += 2
            waiting.append(number)
            full = sum(self.numels[n] for n in waiting) >= self.buckets.reduce
            if full or self.world_size == 1:
                self._flush(waiting, moment, released)
            else:
                self.gradients[number].freed_at = self.reduced
        self._flush(waiting, self.last, released)
        if self.ds.offload_optimizer != "none":
            share = sum(self.group_share(group) for group in self.optimizer.groups if not group.released)
            self.allocate_resident(self.width * share, c.GRADIENTS, "gradients to step on", "cpu")
        self.staging(self.total, self.step)

    def _flush(self, waiting: list[int], moment: int, released: frozenset[int]) -> None:
        """Reduce what is waiting: parts of one owner are joined, what is not this rank's is freed. Then what is
        released is used."""
        if not waiting:
            return
        self._finish(moment)
        used = moment if self.on_gpu or self.buckets.overlap else moment + 1
        parts: dict[int, list[tuple[int, int]]] = {}
        """By owner, in the order in which they are reduced: parameters, and elements of each."""
        for number in waiting:
            for part in self._parts(number):
                parts.setdefault(part.rank, []).append((number, part.numel))
        joined = len(parts.get(self.rank, ())) > 1
        others = self.width * self._joined_for_others(parts)
        self.busy.append(self.allocate(others, c.BUCKETS, "gradients that are reduced together", moment, moment + 1))
        # A part that is its owner's only one is reduced where it lies.
        in_place = {found[0][0] for found in parts.values() if len(found) == 1}
        unapplied: list[Lifetime] = []
        buffer: list[Lifetime] = []
        if here := [number for number in waiting if number in released]:
            self.use_released(used, here)
        for number in waiting:
            autograds, own = self.gradients[number], self.own[number]
            name = f"gradient of {self.dry_run.parameters[number].name}"
            size = self.width * own
            # All of it is this rank's, and alone: it stays where autograd put it.
            whole = not joined and own == self.numels[number]
            autograds.freed_at = 1 + (used if whole else moment)
            if number in in_place and not whole:
                self.busy.append(autograds)
            if number in released and self.on_gpu and not self.on_host:
                waits = autograds if whole else self.allocate(size, c.GRADIENTS, name, moment, moment + 1)
                unapplied.append(waits)
                continue
            goes = number in released or self.ds.offload_optimizer != "none"
            adds = not goes and self.accumulation > 1 and self.ds.stage == 2
            if adds:
                self.accumulated(number, size)
            if whole:
                if not (goes or adds):
                    autograds.freed_at = self.end
            elif goes or adds:
                self.allocate(size, c.BUCKETS, name, moment, used + 1)
            else:  # cut out of what other ranks have parts of, or joined
                made = self.allocate(size, c.GRADIENTS, name, moment, self.end)
                made.parameter = number
                if joined and made.bytes:
                    buffer.append(made)
        self.joined.append(buffer)
        held = [sum(numel for _, numel in found) for found in parts.values()]
        most = max(held, default=0)  # all ranks use a bucket at the same moment
        self._apply_later(unapplied, most, moment, sum(self.own[number] for number in waiting if number in released))
        if self.buckets.overlap:
            for lifetime in self.busy:
                lifetime.freed_at = self.reduced
        else:
            self.busy.clear()
        waiting.clear()

    def _parts(self, number: int) -> list[Fragment]:
        """Which rank keeps what of the gradient of a parameter."""
        size, start = self.places.get(number, (self.numels[number], 0))
        return fragments(0, self.numels[number], size=size, shift=start)

    def _joined_for_others(self, parts: Mapping[int, Sequence[tuple[int, int]]]) -> int:
        """The most elements that `Reducer.flush` holds of what it joins for other ranks, beside this rank's own.

        Reductions that run at once (NCCL's, and with overlap) hold all of it; of others only the one before is still
        there when a part is joined.
        """
        sizes = [sum(numel for _, numel in found) if len(found) > 1 else 0 for found in parts.values()]
        at = list(parts).index(self.rank) if self.rank in parts else len(parts)
        own = sum(numel for _, numel in parts.get(self.rank, ()))
        if self.on_gpu or self.buckets.overlap:
            return sum(size for i, size in enumerate(sizes) if i != at)
        most = 0
        for i in range(len(sizes)):
            there = {i, max(i - 1, 0)} | ({at} if at <= i else set())
            most = max(most, sum(sizes[j] for j in there))
        return max(most - own, 0)

    def _finish(self, moment: int) -> None:
        """With overlap the reduction of a bucket, and what it needs, lasts until the next bucket is full."""
        for lifetime in self.busy:
            lifetime.freed_at = max(lifetime.allocated_at + 1, moment)
        self.busy.clear()

    def _apply_later(self, released: list[Lifetime], elements: int, moment: int, own: int) -> None:
        """toolkit/zero/release.py: on a GPU a bucket of gradients waits for its norms, `elements` at most on one rank.

        `own` of them wait on this one: in `released`, or with offload on the host.
        """
        for lifetime in released:
            lifetime.freed_at = self.end if self.on_gpu else moment + 1
        if not self.on_gpu:
            return
        self.unapplied.append((released, elements, self.width * own if self.on_host else 0))
        self.most_waiting = max(self.most_waiting, sum(size for *_, size in self.unapplied))
        while len(self.unapplied) > 1 and sum(size for _, size, _ in self.unapplied) > self.buckets.reduce:
            for lifetime in self.unapplied.pop(0)[0]:
                lifetime.freed_at = moment + 1

    def _deepspeed_stages_1_and_2(self) -> None:
        """DeepSpeed's stage_1_and_2.py, contiguous_gradients."""
        share = sum(self.group_share(group) for group in self.optimizer.groups)
        waiting: list[int] = []
        first = min((moment for _, moment in self.dry_run.arrivals), default=self.reduced)
        copies = 2 if self.buckets.overlap else 1
        self.allocate(self.width * self.buckets.reduce * copies, c.BUCKETS, "reduction bucket", first, self.step)
        first_own = self.last  # from the first reduction of something that this rank keeps
        for number, moment in self.dry_run.arrivals:
            if self.ds.stage == 1 and self.accumulation > 1:
                self.accumulated(number, self.width * self.numels[number])
                continue
            numel = self.numels[number]
            # It is copied into the bucket, after what is there has made room.
            self.gradients[number].freed_at = moment + 2
            if sum(self.numels[n] for n in waiting) + numel > self.buckets.reduce:
                if any(self.own[n] for n in waiting):
                    first_own = min(first_own, moment + 1)
                self._reduce_bucket(waiting, moment)
            if numel > self.buckets.reduce:
                first_own = min(first_own, moment) if self.own[number] else first_own
            else:
                waiting.append(number)
        self._reduce_bucket(waiting, self.last)
        offloaded = self.ds.offload_optimizer != "none"
        if offloaded:
            self.allocate_resident(4 * share, c.GRADIENTS, "fp32 gradients to step on", "cpu")
            largest = max(self.numels)
            self.allocate_resident(self.width * largest, c.BUCKETS, "staging buffer", "none")
            self.allocate_resident(self.width * largest, c.BUCKETS, "staging buffer", "cpu")
            self.allocate_resident(self.width * share, c.BUCKETS, "weights on their way back", "cpu")
            return
        self.allocate(self.width * share, c.GRADIENTS, "this rank's gradients", first_own, self.end)
        if self.accumulation > 1 and self.ds.stage == 2:
            # A micro-batch's gradients have a buffer of their own, and are added to the earlier ones' at its end.
            self.allocate(self.width * share, c.GRADIENTS, "gradients of earlier micro-batches", -1, self.step)
        self.allocate(self.width * share, c.TRANSIENTS, "gradients, flattened", self.step, self.step + 1)
        self.allocate(4 * share, c.TRANSIENTS, "fp32 gradients", self.step, self.end)
        self.end = self.step + 2
        self.allocate(self.optimizer.step_per_element * share, c.TRANSIENTS, "the step's own", self.step + 1, self.end)

    def _reduce_bucket(self, waiting: list[int], moment: int) -> None:
        if waiting and self.world_size > 1:
            size = self.width * sum(self.numels[number] for number in waiting)
            self.allocate(size, c.BUCKETS, "gradients that are reduced together", moment, moment + 1)
        waiting.clear()

    # ---- stage 3 --------------------------------------------------------------------------------------------------

    def _stage_3(self) -> None:
        """DeepSpeed's stage3.py, and toolkit/zero/stage3.py, whose step uses gradients where they lie."""
        share = sum(self.group_share(group) for group in self.optimizer.groups)
        self.allocate(self.width * self.buckets.reduce, c.BUCKETS, "reduction bucket", -1, None)
        offloaded = self.ds.offload_optimizer != "none"
        held = sum(self.group_share(group) for group in self.optimizer.groups if not group.released)
        self.allocate_resident(self.width * held, c.GRADIENTS, "this rank's gradients", "cpu" if offloaded else "none")
        if self.world_size > 1 or (self.ds.offload_param != "none" and self.on_gpu):
            self.gathered = gather(
                self.dry_run,
                self.width,
                self.numels,
                self.padded,
                self.buckets,
                self.allocate,
                ranks=self.world_size,
                on_gpu=self.on_gpu,
            )
        waiting: list[int] = []
        for number, moment in self.dry_run.arrivals:
            numel = self.numels[number]
            if waiting and sum(self.numels[n] for n in waiting) + numel > self.buckets.reduce:
                self._scatter(waiting, moment)
            waiting.append(number)
            self.gradients[number].freed_at = moment + 1 if numel <= self.buckets.reduce else self.step
        self._scatter(waiting, self.last)
        if self.optimizer.ours:
            self.staging(self.total, self.step)
            return
        if offloaded:
            self.allocate_resident(4 * share, c.GRADIENTS, "fp32 gradients to step on", self.ds.offload_optimizer)
            return
        largest = self._largest_sub_group()
        self.allocate(self.width * largest, c.TRANSIENTS, "gradients of a sub-group, flattened", self.step, self.end)
        self.allocate(4 * largest, c.TRANSIENTS, "fp32 gradients of a sub-group", self.step, self.end)
        self.allocate(self.optimizer.step_per_element * largest, c.TRANSIENTS, "the step's own", self.step, self.end)

    def _scatter(self, waiting: list[int], moment: int) -> None:
        if not waiting:
            return
        size = self.width * sum(self.padded[number] for number in waiting)
        if len(waiting) > 1 or self.padded[waiting[0]] > self.numels[waiting[0]]:
            self.allocate(size, c.BUCKETS, "gradients that are reduced together", moment, moment + 1)
        if self.on_gpu:
            self.allocate(size / self.world_size, c.BUCKETS, "result of the reduction", moment, moment + 1)
        for number in waiting:
            if self.gradients[number].freed_at == self.step:  # too large for the bucket
                self.gradients[number].freed_at = moment + 1
        if used := [number for number in waiting if number in self.optimizer.released]:
            self.use_released(moment, used)
            own = sum(self.own[number] for number in used)
            kept = []
            if self.on_gpu and not self.on_host:
                kept = [self.allocate(self.width * own, c.GRADIENTS, "gradients to be used", moment, moment + 1)]
            self._apply_later(kept, own, moment, own)
        waiting.clear()

    def _largest_sub_group(self) -> int:
        sizes = {number: -(-numel // self.world_size) for number, numel in enumerate(self.numels)}
        return max(
            sum(sizes[number] for number in numbers)
            for group in self.optimizer.groups
            for numbers in self.sub_groups(group)
        )
