"""What this rank holds of which parameter, at ZeRO stages 1, 2 and 3: the only walk over DeepSpeed's groups.

A rule's statistics and matrices, checkpoints and full-precision weights ask here which elements of its flat tensors are
whose. Of a matrix a fragment is whole blocks, which belong to no other parameter (`toolkit.state.sharding`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepspeed import comm as dist
from torch import Tensor

from toolkit.state.sharding import Fragment, held, whole_shape


@dataclass(frozen=True)
class Member:
    """A parameter of a flat tensor: `offset` and `share` as of `Place`; `fragment` is what this rank holds of it."""

    param: Any
    offset: int
    share: int
    fragment: Fragment | None
    process_group: Any


@dataclass(frozen=True)
class Shard:
    """A flat tensor that the optimizer steps on this rank: of a parameter group, at stage 3 of a part of one."""

    tensor: Tensor
    group: int
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
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return [_stage_3(zero, i) for i in range(len(zero.fp16_groups))]
    return [_stages_1_and_2(zero, i) for i in range(len(zero.bit16_groups))]


def members(zero: Any) -> Iterator[tuple[Shard, Member]]:
    """Every parameter, with the flat tensor that holds it."""
    for shard in shards(zero):
        for member in shard.members:
            yield shard, member


def _stages_1_and_2(zero: Any, i: int) -> Shard:
    group, size = zero.real_dp_process_group[i], int(zero.partition_size[i])
    rank, found = dist.get_rank(group=group), []
    for param, offset in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
        own = held(rank, param.numel(), size=size, shift=int(offset))
        found.append(Member(param, int(offset), 0, own, group))
    return Shard(zero.single_partition_of_fp32_groups[i], i, tuple(found))


def _stage_3(zero: Any, i: int) -> Shard:
    offset, found = 0, []
    for param in zero.fp16_groups[i]:
        share, rank = param.partition_numel(), zero._get_param_partition_rank(param)
        own = held(rank, whole_shape(param).numel(), size=share, before=offset)
        found.append(Member(param, offset, share, own, zero._get_param_partition_group(param)))
        offset += share
    return Shard(zero.fp32_partitioned_groups_flat[i], zero.sub_group_to_group_id[i], tuple(found))
