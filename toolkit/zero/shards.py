"""What this rank holds of which parameter, at ZeRO stages 1, 2 and 3: the only walk over DeepSpeed's groups.

The step, a rule's statistics and matrices, checkpoints and full-precision weights ask here which elements of the flat
tensors are whose. Of a matrix a fragment is whole blocks, which belong to no other parameter
(`toolkit.state.sharding`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import Fragment, blocks_of, fragments, held, whole_shape


@dataclass(frozen=True)
class Member:
    """A parameter of a flat tensor; `offset` and `share` as of `Place`.

    Args:
        shape: of the whole parameter.
        group: number of the parameter group.
        rank: of this process in `process_group`, the ranks that hold the parameter.
        size: elements of each rank of what is cut: the flat tensor (stages 1 and 2) or the parameter (stage 3).
        at: where the parameter begins in its parameter group, in elements: of a matrix a block, the same for every way
            in which the group is cut.
    """

    param: Any
    shape: torch.Size
    group: int
    process_group: Any
    rank: int
    offset: int
    size: int
    share: int
    at: int

    @cached_property
    def fragments(self) -> list[Fragment]:
        """Which rank holds what of it, padding left out."""
        return fragments(0, self.shape.numel(), **self._cut)

    @cached_property
    def fragment(self) -> Fragment | None:
        """What this rank holds."""
        return held(self.rank, self.shape.numel(), **self._cut)

    @property
    def stepped(self) -> slice:
        """Where this rank's flat tensor is stepped for it: what is held here, at stage 3 with the padding."""
        if self.share:
            return slice(self.offset, self.offset + self.share)
        return self.fragment.elements if self.fragment is not None else slice(0, 0)

    @property
    def first_block(self) -> int:
        """The number of this rank's first block, in the whole parameter group and over all ranks."""
        return (self.at + (self.fragment.start if self.fragment is not None else 0)) // BLOCK

    @property
    def _cut(self) -> dict[str, int]:
        return {"size": self.size, "before" if self.share else "shift": self.offset}


@dataclass(frozen=True)
class Shard:
    """A flat tensor that the optimizer steps on this rank: of a parameter group, at stage 3 of a part of one.

    `first_block`: as of `Member`, of the whole tensor; at stage 3, where its parameters are numbered apart, 0.
    """

    number: int
    group: int
    tensor: Tensor
    first_block: int
    members: tuple[Member, ...]

    def runs(self) -> Iterator[tuple[int, Fragment]]:
        """Number among `members` and fragment of what is held here, in the order in which they lie in `tensor`.

        `fragment.blocks` are the blocks of `tensor` that are the member's, `fragment.numel` its elements in them,
        which begin at the first; 1-D parameters share blocks.
        """
        found = [(i, member.fragment) for i, member in enumerate(self.members) if member.fragment is not None]
        yield from sorted(found, key=lambda run: run[1].offset)


def shards(zero: Any) -> list[Shard]:
    """All flat tensors of `zero`, DeepSpeed's ZeRO optimizer or a subclass, in the order of its groups."""
    return list(_stage_3(zero) if _is_stage_3(zero) else _stages_1_and_2(zero))


def members(zero: Any) -> Iterator[tuple[Shard, Member]]:
    """Every parameter, with the flat tensor that holds it."""
    for shard in shards(zero):
        for member in shard.members:
            yield shard, member


def are_shards(optimizer: Any) -> bool:
    """Whether `shards` can walk over an engine's optimizer, which without ZeRO is another wrapper or none."""
    return _is_stage_3(optimizer) or hasattr(optimizer, "round_robin_bit16_groups")


def trained_groups(optimizer: Any) -> list[list[Any]]:
    """The model's parameters that an engine's optimizer steps, whatever wraps it: by parameter group or flat tensor."""
    if are_shards(optimizer):
        return [[member.param for member in shard.members] for shard in shards(optimizer)]
    for attribute in ("bf16_groups", "fp16_groups"):
        if hasattr(optimizer, attribute):
            return [list(group) for group in getattr(optimizer, attribute)]
    return [list(group["params"]) for group in getattr(optimizer, "param_groups", ())]


def model_weights(zero: Any, shard: Shard) -> Any:
    """This rank's part of the model's own weights, which `shard.tensor` is or stands for; None where they lie on NVMe.

    Looked up at each call: DeepSpeed makes new ones when they come back from `offload_states`.
    """
    if _is_stage_3(zero):
        return zero.fp16_partitioned_groups_flat[shard.number]
    return zero.parallel_partitioned_bit16_groups[shard.number][shard.members[0].rank]


class Uncloned(Tensor):
    """This rank's part of a group's weights, while DeepSpeed converts a clone of it to master weights.

    The clones of all groups would be a second model. Where the weights are the master weights they are shared, and what
    is converted is copied by that.
    """

    def clone(self, **_: Any) -> Tensor:
        return self.data.as_subclass(Tensor)


@contextmanager
def uncloned(zero: Any) -> Iterator[None]:
    """While stage 3 makes master weights on the host: it converts no clones."""
    flats = zero.fp16_partitioned_groups_flat
    zero.fp16_partitioned_groups_flat = [None if flat is None else flat.as_subclass(Uncloned) for flat in flats]
    yield
    zero.fp16_partitioned_groups_flat = flats


def part_masters(zero: Any) -> None:
    """While stage 3 lays out groups: where weights are their own master weights, make two tensors of one memory.

    DeepSpeed uses one, and makes it require gradients.
    """
    masters = zero.fp32_partitioned_groups_flat
    for i, (master, own) in enumerate(zip(masters, zero.fp16_partitioned_groups_flat, strict=True)):
        if master is own:
            masters[i] = own.data.requires_grad_()
            masters[i].ds_id = own.ds_id
            own.requires_grad_(False)


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _stages_1_and_2(zero: Any) -> Iterator[Shard]:
    for i, tensor in enumerate(zero.single_partition_of_fp32_groups):
        process_group, size = zero.real_dp_process_group[i], int(zero.partition_size[i])
        rank, found = dist.get_rank(group=process_group), []
        for param, place in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
            offset = int(place)
            found.append(Member(param, whole_shape(param), i, process_group, rank, offset, size, 0, offset))
        yield Shard(i, i, tensor, rank * size // BLOCK, tuple(found))


def _stage_3(zero: Any) -> Iterator[Shard]:
    blocks: dict[int, int] = {}  # so far, by parameter group
    for i, tensor in enumerate(zero.fp32_partitioned_groups_flat):
        group, offset, found = zero.sub_group_to_group_id[i], 0, []
        for param in zero.fp16_groups[i]:
            process_group, share = zero._get_param_partition_group(param), param.partition_numel()
            rank, shape, at = dist.get_rank(group=process_group), whole_shape(param), blocks.get(group, 0) * BLOCK
            found.append(Member(param, shape, group, process_group, rank, offset, share, share, at))
            blocks[group] = blocks.get(group, 0) + blocks_of(shape.numel())
            offset += share
        yield Shard(i, group, tensor, 0, tuple(found))
