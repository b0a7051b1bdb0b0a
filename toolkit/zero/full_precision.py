"""The fp32 weights that training really has: bf16 weights and their remainders, or DeepSpeed's master weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.state.codecs import BLOCK
from toolkit.state.layout import REMAINDER
from toolkit.zero.stage3 import ShardedZeroOptimizer3
from toolkit.zero.stage12 import ShardedZeroOptimizer


@torch.no_grad()
def full_precision_state_dict(engine: Any, *, gather: bool = True) -> dict[str, Tensor]:
    """The model's parameters in fp32, exactly as trained, and its buffers as they are, on the CPU.

    Every rank must call this. With `gather` rank 0 gets whole tensors in the module's shapes and all others an empty
    dict; one parameter at a time is whole on the device. Without, every rank gets the parts that it trains, flat, and
    nothing is sent: key "name[start:stop]", elements of the flattened parameter. Frozen parameters are whole at rank
    0 either way (at stage 3 only with `gather`). Names of tied parameters share a tensor.

    Raises:
        UserError: `engine` does not run one of this package's optimizers at ZeRO stage 1, 2 or 3.
    """
    zero = engine.optimizer
    if not isinstance(zero, ShardedZeroOptimizer | ShardedZeroOptimizer3):
        raise UserError(
            "full_precision_state_dict needs an engine that runs a rule of this package at ZeRO stage 1, 2 or 3, "
            f"not {type(zero).__name__}"
        )
    module: nn.Module = engine.module
    names = {id(param): name for name, param in module.named_parameters()}
    found: dict[str, Tensor] = {}
    trained = set()
    parts = _parts_3(zero) if isinstance(zero, ShardedZeroOptimizer3) else _parts_12(zero)
    for param, group, pieces in parts:
        trained.add(id(param))
        if not gather:
            for start, values in pieces:
                found[f"{names[id(param)]}[{start}:{start + values.numel()}]"] = values.cpu()
            continue
        shape = getattr(param, "ds_shape", param.shape)
        # Bit patterns of one rank beside zeros of all others: their sum is exact, the sign of zero included.
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=get_accelerator().current_device_name())
        for start, values in pieces:
            bits[start : start + values.numel()] = values.to(bits.device).view(torch.int32)
        dist.reduce(bits, dist.get_global_rank(group, 0), group=group)
        if dist.get_rank() == 0:
            found[names[id(param)]] = bits.view(torch.float32).view(shape).cpu()
        del bits
    for name, param in module.named_parameters():
        if id(param) not in trained and (gather or not hasattr(param, "ds_shape")):
            whole = _gathered(param)
            if dist.get_rank() == 0:
                found[name] = whole.float().cpu()
    if dist.get_rank() == 0:
        found.update({name: buffer.cpu() for name, buffer in module.named_buffers() if _saved(module, name)})
        if gather:
            for name, param in module.named_parameters(remove_duplicate=False):
                found.setdefault(name, found[names[id(param)]])
    return found


def _saved(module: nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return key not in module.get_submodule(owner)._non_persistent_buffers_set


_Part = tuple[Any, Any, list[tuple[int, Tensor]]]


def _parts_12(zero: ShardedZeroOptimizer) -> Iterator[_Part]:
    """Each parameter, its process group, and what this rank holds of it: (start, fp32 values)."""
    for i, params in enumerate(zero.bit16_groups):
        group = zero.real_dp_process_group[i]
        rank = dist.get_rank(group=group)
        for param in params:
            places = [place for place in zero.slices_of(param) if place.owner == rank]
            master = zero.single_partition_of_fp32_groups[i]
            yield (
                param,
                group,
                [(p.start, _values(zero, i, master, p.offset, p.offset + p.stop - p.start)) for p in places],
            )


def _parts_3(zero: ShardedZeroOptimizer3) -> Iterator[_Part]:
    for i, params in enumerate(zero.fp16_groups):
        master, offset = zero.fp32_partitioned_groups_flat[i], 0
        for param in params:
            size = param.partition_numel()
            start = size * zero._get_param_partition_rank(param)
            held = min(max(param.ds_numel - start, 0), size)
            group = zero.sub_group_to_group_id[i]
            pieces = [(start, _values(zero, group, master, offset, offset + held))] if held else []
            yield param, zero._get_param_partition_group(param), pieces
            offset += size


def _values(zero: Any, group: int, master: Tensor, start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of an optimizer's tensor, fp32."""
    weights = master.detach()[start:stop]
    if weights.dtype != torch.bfloat16:
        return weights.float()
    kept = zero.optimizer.layout(zero.optimizer.param_groups[group], master.dtype)
    state = zero.optimizer.state.get(master, {})
    if not state:  # nothing has been trained yet
        return weights.float()
    first, last = start // BLOCK, -(-stop // BLOCK)
    keys = kept.keys(REMAINDER)
    low = kept.remainder.unpacked(*(state[key][first:last] for key in keys))
    inside = slice(start - first * BLOCK, stop - first * BLOCK)
    joined: Tensor = kept.remainder.join(weights, *(part.reshape(-1)[inside] for part in low))
    return joined


def _gathered(param: Any) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_shape")):
        whole: Tensor = param.detach().clone()
        return whole
