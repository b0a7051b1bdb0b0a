"""Shards that are whole blocks, so that the block grid is the same at every world size.

DeepSpeed 0.19 cuts partitions anywhere. Stages 1 and 2 flatten each parameter group and split it evenly:
`stage12.ShardedZeroOptimizer` pads the group to blocks times world size. Stage 3 splits each parameter: `install()`
pads parameters likewise, which takes small replacements in DeepSpeed's modules, since each of them works out a
partition's size for itself; on CPUs some are for memory, too (`lending.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import deepspeed.runtime.comm.coalesced_collectives as ds_collectives
import deepspeed.runtime.zero.partition_parameters as ds_parameters
import deepspeed.runtime.zero.stage3 as ds_stage3
import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.state.sharding import share_of
from toolkit.zero.agreement import check_first_gathers
from toolkit.zero.lending import add_in_place, gather_in_place
from toolkit.zero.shards import members


def padding(shape: Sequence[int], world_size: int) -> int:
    """Elements that stage 3 adds to a parameter of `shape`, so that each rank's part is whole blocks.

    1-D parameters have fp32 state and no blocks: they keep DeepSpeed's own layout, a multiple of world size.
    """
    return share_of(shape, world_size) * world_size - math.prod(shape)


def _padding_size(self: Any, param: Any) -> int:
    return padding(param.ds_shape, self._partition_world_size(param))


_allgather = ds_parameters._dist_allgather_fn


def _allgather_whole_blocks(input_tensor: Tensor, output_tensor: Tensor, group: Any = None) -> Any:
    """partition_parameters._dist_allgather_fn, into a buffer that may lack room for the padding.

    DeepSpeed sizes the buffer of a parameter that it gathers alone by its numel and the world size. On a CPU each rank
    sends what there is room for.
    """
    world_size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    share = input_tensor.numel()
    if output_tensor.is_cpu:
        parts = output_tensor.split(share)
        if rank < len(parts) and parts[rank].data_ptr() != input_tensor.data_ptr():
            parts[rank].copy_(input_tensor[: parts[rank].numel()])
        return gather_in_place(parts, group)
    full = share * world_size
    if full <= output_tensor.numel():
        return _allgather(input_tensor, output_tensor, group)
    gathered = output_tensor.new_empty(full)
    return _CopyAfterwards(_allgather(input_tensor, gathered, group), gathered, output_tensor)


class _CopyAfterwards:
    """The handle of a collective whose result is copied, less its end, once it is there."""

    def __init__(self, handle: Any, source: Tensor, target: Tensor) -> None:
        self._handle, self._source, self._target = handle, source, target

    def wait(self, **kwargs: Any) -> None:
        self._handle.wait(**kwargs)
        self._target.copy_(self._source[: self._target.numel()])


_reduce_scatter = ds_stage3.reduce_scatter_coalesced
_sum_and_scatter: Any = getattr(ds_collectives, "_torch_reduce_scatter_fn", None)  # `compatibility.py` looks for it
_no_gather = ds_parameters._no_gather_coalesced


def _sum_in_place(input_tensor: Tensor, output_tensor: Tensor, group: Any = None, **kwargs: Any) -> Any:
    """coalesced_collectives._torch_reduce_scatter_fn, whose output is this rank's part of its input."""
    if not input_tensor.is_cpu:
        return _sum_and_scatter(input_tensor, output_tensor, group=group, **kwargs)
    own = input_tensor.chunk(torch.distributed.get_world_size(group))[torch.distributed.get_rank(group)]
    assert own.data_ptr() == output_tensor.data_ptr()
    return add_in_place(input_tensor, group)


def _reduce_scatter_whole_blocks(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """coalesced_collectives.reduce_scatter_coalesced on gradients padded (with zeros) like the parameters.

    Each rank's parts of all of them lie one after the other, as DeepSpeed has them, in a buffer that is made once.
    """
    ranks = torch.distributed.get_world_size(group)
    shares = [share_of(tensor.shape, ranks) for tensor in tensors]
    if len(tensors) == 1 and shares[0] * ranks == tensors[0].numel():
        return _reduce_scatter(tensors, group)
    joined = tensors[0].new_empty(ranks, sum(shares))
    for tensor, places, share in zip(tensors, joined.split(shares, dim=1), shares, strict=True):
        whole = tensor.numel() // max(share, 1)  # parts without padding
        parts, rest = tensor.reshape(-1).split([whole * share, tensor.numel() - whole * share])
        places[:whole] = parts.view(whole, share)
        if whole < ranks:
            places[whole:] = 0
            places[whole, : rest.numel()] = rest
    [own] = _reduce_scatter([joined], group)
    return list(own.split(shares))


def _no_gather_on_stream(params: Iterable[Any]) -> Any:
    """partition_parameters._no_gather_coalesced, where one rank holds the parameter and its padding."""
    held = list(params)
    if any(hasattr(param.ds_tensor, "ds_quant_scale") for param in held):
        return _no_gather(held)
    return _LocalHandle(held)


class _LocalHandle:
    """partition_parameters.NoGatherCoalescedHandle, less the padding, and without the host waiting for the copies."""

    def __init__(self, params: list[Any]) -> None:
        self._params = params
        device = ds_parameters.get_accelerator()
        for param in params:
            assert param.ds_status == ds_parameters.ZeroParamStatus.NOT_AVAILABLE, param.ds_summary()
            param.ds_status = ds_parameters.ZeroParamStatus.INFLIGHT
            local = param.ds_tensor.data.to(device=device.current_device_name(), non_blocking=True)
            param.data = local.narrow(0, 0, param.ds_numel).view(param.ds_shape)
        self._copied = None if device.is_synchronized_device() else device.Event()
        if self._copied is not None:
            self._copied.record()

    def wait(self, **_: Any) -> None:
        # Several parameters share a handle: by the time of a later one's use an earlier one may be released.
        if self._copied is not None:
            ds_parameters.get_accelerator().current_stream().wait_event(self._copied)
        for param in self._params:
            param.ds_status = ds_parameters.ZeroParamStatus.AVAILABLE
        self._params = []


def _own_part(zero: Any, value: Tensor, param: Any) -> Tensor:
    """Of a whole `value` this rank's part of `param`, with the padding."""
    share = param.ds_tensor.numel()
    whole = torch.nn.functional.pad(
        value.flatten(), (0, share * zero._get_param_partition_world_size(param) - value.numel())
    )
    return whole.narrow(0, share * zero._get_param_partition_rank(param), share)


def _set_full_hp_param(self: Any, value: Tensor, param: Any, optim_state_key: str | None = None) -> None:
    """stage3.set_full_hp_param, where parts end behind the parameter."""
    self.set_local_hp_param(_own_part(self, value, param), param, optim_state_key)


def _set_fp32_grad_for_param(self: Any, value: Tensor, param: Any) -> None:
    """stage3.set_fp32_grad_for_param likewise."""
    self.set_local_grad_for_param(_own_part(self, value, param), param)


def install() -> None:
    """Put the whole-block layout in place, for this process and all engines it makes from now on.

    Engines with another optimizer keep DeepSpeed's layout at stages 1 and 2; at stage 3 their matrices are
    padded by less than BLOCK elements per rank, which changes no number.
    """
    ds_parameters.Init._padding_size = _padding_size
    ds_parameters._dist_allgather_fn = _allgather_whole_blocks
    ds_parameters._no_gather_coalesced = _no_gather_on_stream
    ds_stage3.reduce_scatter_coalesced = _reduce_scatter_whole_blocks
    ds_collectives._torch_reduce_scatter_fn = _sum_in_place
    ds_stage3.DeepSpeedZeroOptimizer_Stage3.set_full_hp_param = _set_full_hp_param
    ds_stage3.DeepSpeedZeroOptimizer_Stage3.set_fp32_grad_for_param = _set_fp32_grad_for_param
    check_first_gathers()


def check_stage_3(zero_optimizer: Any) -> None:
    """Refuse the ways of reducing gradients that cut them by another layout than the parameters.

    Raises UserError. They are stage3.py's `__avg_scatter_contiguous_grads` and `all_to_all_quant_reduce`.
    """
    if not zero_optimizer.reduce_scatter:
        raise UserError(
            "zero_optimization.reduce_scatter is false, but at stage 3 gradients are cut into whole blocks, for which "
            "it must be true (the default)"
        )
    if zero_optimizer.all2all_process_group is not None:
        raise UserError(
            "zero_optimization.zero_quantized_gradients does not cut gradients into whole blocks; leave it out"
        )


@torch.no_grad()
def zero_padding(zero_optimizer: Any) -> None:
    """Clear what lies behind the end of each stage 3 parameter: DeepSpeed leaves it uninitialised."""
    for shard, member in members(zero_optimizer):
        held = 0 if member.fragment is None else member.fragment.numel
        shard.tensor[member.offset + held : member.offset + member.share].zero_()
