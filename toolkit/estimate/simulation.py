"""What the simulated step of every ZeRO stage is put together from: storages, this rank's shares, the step's end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from toolkit.config import DeepSpeedSettings
from toolkit.config.batch import Batch
from toolkit.estimate.dry_run import DryRun
from toolkit.estimate.optimizer_memory import Group, OptimizerMemory
from toolkit.estimate.together import Flat, Part, opened, step_together
from toolkit.memory.storages import Lifetime
from toolkit.records import categories as c
from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import held, shard_size, share_of
from toolkit.zero.gradients import NORM_CHUNK


class Simulation:
    """A step of one rank as it is put together; arguments as of `toolkit.estimate.zero_step.simulate`."""

    def __init__(
        self, dry_run: DryRun, ds: DeepSpeedSettings, optimizer: OptimizerMemory, batch: Batch, rank: int, on_gpu: bool
    ) -> None:
        self.dry_run, self.ds, self.optimizer = dry_run, ds, optimizer
        self.world_size, self.accumulation = batch.world_size, batch.accumulation
        self.buckets, self.width, self.rank, self.on_gpu = ds.buckets, ds.dtype.itemsize, rank, on_gpu
        self.on_host = on_gpu and ds.offload_optimizer != "none"
        """Whether the step runs on the host of a GPU, in memory of its own."""
        self.stepped_on = "cuda" if on_gpu and not self.on_host else "cpu"
        self.lifetimes = [replace(x) for x in dry_run.gradients]
        """Of gradients and of what ZeRO and the optimizer hold; all else is the dry run's own."""
        self.host: dict[str, int] = {c.ACTIVATIONS: dry_run.offloaded} if dry_run.offloaded else {}
        self.nvme: dict[str, int] = {}
        self.unapplied: list[tuple[list[Lifetime], int, int]] = []
        self.most_waiting = 0
        """Bytes of released gradients that wait on the host, at most."""
        self.busy: list[Lifetime] = []
        self.used: list[tuple[int, list[int], float]] = []
        """Gradients that are released, by bucket: when they are used, of which parameters they are, and how many of the
        bytes that are counted at that moment are gone by then."""
        self.joined: list[list[Lifetime]] = []
        """Gradients that came out of one reduction: parts of one buffer."""
        self.numels = [parameter.numel for parameter in dry_run.parameters]
        # What ranks hold of each together at stage 3, where each is cut by itself.
        self.padded = [share_of(one.shape, self.world_size) * self.world_size for one in dry_run.parameters]
        self.total = sum(self.numels[number] for group in optimizer.groups for number in group.numbers)
        # The gradient that autograd made, by parameter.
        self.gradients = {x.parameter: x for x in self.lifetimes if x.parameter is not None}
        for number, moment in dry_run.arrivals:
            if number not in self.gradients:  # a part of something larger
                name = f"gradient of {dry_run.parameters[number].name}"
                size = self.width * dry_run.parameters[number].numel
                self.gradients[number] = Lifetime(
                    size, moment, moment + 1, c.BACKWARD, c.GRADIENTS, name, parameter=number
                )
                self.lifetimes.append(self.gradients[number])
        # After the pass: the end of the reduction, then the step, a moment for each thing that it holds.
        self.last = dry_run.storages.now - 2
        self.reduced = dry_run.storages.now
        self.step = self.reduced + 1
        self.places: dict[int, tuple[int, int]] = {}
        """At stages 1 and 2, of each parameter: its group's elements on each rank, and those before it in the group."""
        self.own = self._shares()
        # Then, one for each, the passes and rounds of what is stepped together.
        self.together = step_together(
            [flat for group in optimizer.groups if not group.released for flat in self._flats(group)],
            ranks=self.world_size if ds.stage else 1,
            rank=rank if ds.stage else 0,
            device=self.stepped_on,
        )
        self.end = self.step + 1 + len(self.together.moments)
        self.sent = self.together.sent
        # What is updated during the backward pass, and looks at whole parameters or has factored states.
        self.released = [flat for group in optimizer.groups if group.released for flat in self._flats(group)]

    # ---- small parts ----------------------------------------------------------------------------------------------

    def allocate(self, size: float, category: str, what: str, start: int, end: int | None) -> Lifetime:
        """Add a storage on the device, from one moment to another."""
        lifetime = Lifetime(round(size), start, end, self._phase(start), category, what)
        if lifetime.bytes > 0:
            self.lifetimes.append(lifetime)
        return lifetime

    def _phase(self, moment: int) -> str:
        if moment < 0:
            return c.INIT
        if moment >= self.reduced:
            return c.REDUCE if moment < self.step else c.STEP
        return next(name for name, start in reversed(self.dry_run.storages.phases) if start <= moment)

    def allocate_resident(self, size: float, category: str, what: str, place: str) -> None:
        """Allocate for good, on the device, the host or NVMe."""
        if place == "nvme":
            self.nvme[category] = self.nvme.get(category, 0) + round(size)
        elif place == "cpu" and self.on_gpu:
            self.host[category] = self.host.get(category, 0) + round(size)
        else:
            self.allocate(size, category, what, -1, None)

    def _shares(self) -> dict[int, int]:
        """Elements of each parameter's gradient that this rank keeps."""
        ranks = self.world_size
        if self.ds.stage == 0 or ranks == 1:
            return dict(enumerate(self.numels))
        own: dict[int, int] = {}
        for group in self.optimizer.groups:
            if self.ds.stage == 3:
                own.update({number: self.padded[number] // ranks for number in group.numbers})
                continue
            size, start = self.group_share(group), 0
            for number in group.numbers:
                self.places[number] = size, start
                mine = held(self.rank, self.numels[number], size=size, shift=start)
                own[number] = mine.numel if mine is not None else 0
                start += self.numels[number]
        return own

    def group_share(self, group: Group) -> int:
        """Elements of `group` on one rank, padding included."""
        ranks, sizes = self.world_size, [self.numels[number] for number in group.numbers]
        if self.ds.stage == 0:
            return sum(sizes)
        if self.ds.stage == 3:
            return sum(self.padded[number] for number in group.numbers) // ranks
        return shard_size(sum(sizes), ranks, BLOCK if self.optimizer.ours else 2)

    def staging(self, numel: int, moment: int) -> None:
        """Pieces of so many elements of gradients, of which the norm is taken, and that are joined."""
        if not self.on_gpu:
            self.allocate(4 * min(NORM_CHUNK, numel), c.TRANSIENTS, "pieces of gradients", moment, moment + 1)

    def use_released(self, moment: int, numbers: list[int]) -> None:
        """Gradients that are released are used, once their norms are taken, of one after the other."""
        largest = max(self.own[number] for number in numbers)
        self.staging(largest, moment)
        self.used.append((moment, numbers, 0.0 if self.on_gpu else 4.0 * min(NORM_CHUNK, largest)))

    def opening(self) -> None:
        """What released groups hold when their gradients are used: of whole parameters, or of factored states what a
        step finds of them, and a stretch of each parameter in turn."""
        what = "rows and columns of second moments"
        settled = [flat for flat in self.released if not flat.rule.statistics]
        sums = sum(flat.sums for flat in settled)
        first = min((moment for moment, *_ in self.used), default=self.reduced)
        found = sums + sum(flat.shares for flat in settled)
        if not self.on_host:
            self.allocate(found, c.TRANSIENTS, what, first, self.end)
            self.allocate(sums, c.TRANSIENTS, what, self.step, self.end)
        on_host = float(sums)
        parts = {part.number: (flat, part) for flat in self.released for part in flat.parts}
        for moment, numbers, gone in self.used:
            here = [parts[number] for number in numbers if number in parts]
            looks = [replace(flat, parts=(part,)) for flat, part in here if flat.rule.statistics]
            together = step_together(looks, ranks=self.world_size, rank=self.rank, device=self.stepped_on)
            self.sent += together.sent
            self._keep_counts(together.counts)
            most = [(one.bytes, one.what) for one in together.moments]
            for flat, part in here:
                if not flat.rule.statistics:
                    most.append((flat.factored * opened(part, self.stepped_on), "second moments of a stretch"))
            size, name = max(most, default=(0, what))
            if self.on_host:
                on_host = max(on_host, size)
            else:
                self.allocate(size - gone, c.TRANSIENTS, name, moment, moment + 1)
        if self.on_host:
            self._transient_on_host(found + on_host)

    def _transient_on_host(self, size: float) -> None:
        self.host[c.TRANSIENTS] = max(self.host.get(c.TRANSIENTS, 0), round(size))

    def _keep_counts(self, size: int) -> None:
        """The host's, from step to step."""
        if not self.on_gpu:
            self.allocate(size, c.OTHER, "counts of means", -1, None)

    def accumulated(self, number: int, size: float) -> Lifetime:
        """What earlier micro-batches have summed up is there from the start; this one's is added to it."""
        made = self.allocate(size, c.GRADIENTS, f"gradient of {self.dry_run.parameters[number].name}", -1, self.end)
        made.parameter = number
        return made

    def sub_groups(self, group: Group) -> list[list[int]]:
        """The parameters of a group as DeepSpeed flattens them."""
        found: list[list[int]] = [[]]
        size = 0
        for number in group.numbers:
            if size >= self.buckets.sub_group:
                found.append([])
                size = 0
            found[-1].append(number)
            size += -(-self.numels[number] // self.world_size)
        return found

    # ---- rules that look at whole parameters ----------------------------------------------------------------------

    def _flats(self, group: Group) -> Iterator[Flat]:
        """The flat tensors of a group whose rule does, with what this rank steps of each parameter."""
        if group.together is None:
            return
        width = (4 if group.master else self.width) + sum(group.per_element.values())
        stage, whole = self.ds.stage, self.group_share(group)
        if stage == 0:
            numbers = [[number] for number in group.numbers]
        else:
            numbers = self.sub_groups(group) if stage == 3 else [list(group.numbers)]
        for own in numbers:
            parts, at = [], 0
            for number in own:
                shape, numel = self.dry_run.parameters[number].shape, self.numels[number]
                if stage == 3:
                    size = share_of(shape, self.world_size)
                    fragment = held(self.rank, numel, size=size, before=at)
                    at += size
                else:
                    fragment = held(self.rank if stage else 0, numel, size=whole, shift=at)
                    at += numel
                parts.append(Part(number, shape, numel, fragment))
            yield Flat(group.together, tuple(parts), width, group.factored)

    def step_together(self) -> None:
        """Lets go of gradients as they are used, and allocates what a pass or a round holds."""
        self._keep_counts(self.together.counts)
        used_at: dict[int | None, int] = {}
        for group in self.optimizer.groups:
            if group.together is None:
                used_at.update(dict.fromkeys(group.numbers, self.step + 1))
        for moment, one in enumerate(self.together.moments, self.step + 1):
            used_at.update(dict.fromkeys(one.used, moment + 1))
            if self.on_host:
                self._transient_on_host(one.bytes)
                self.allocate(one.exchanged, c.TRANSIENTS, one.what, moment, moment + 1)
            else:
                self.allocate(one.bytes, c.TRANSIENTS, one.what, moment, moment + 1)
        if self.together.moments and self.ds.stage in (1, 2):
            for lifetime in self.lifetimes:
                if lifetime.freed_at == self.end and lifetime.category == c.GRADIENTS:
                    lifetime.freed_at = used_at.get(lifetime.parameter, self.end)
            for buffer in self.joined:  # which the last one to be used keeps
                for lifetime in buffer:
                    lifetime.freed_at = max(one.freed_at or self.end for one in buffer)
