"""The fp32 weights that training really has: bf16 weights and their remainders, or DeepSpeed's master weights."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.zero.access import bits_of, values
from toolkit.zero.shards import members
from toolkit.zero.stage3 import ShardedZeroOptimizer3
from toolkit.zero.stage12 import ShardedZeroOptimizer
from toolkit.zero.untrained import persistent


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
    for shard, member in members(zero):
        param, own = member.param, member.fragment
        trained.add(id(param))
        mine = None if own is None else values(zero, shard, own)
        if not gather:
            if own is not None and mine is not None:
                found[f"{names[id(param)]}[{own.start}:{own.stop}]"] = mine.cpu()
            continue
        bits = bits_of(member, mine)
        dist.reduce(bits, dist.get_global_rank(member.process_group, 0), group=member.process_group)
        if dist.get_rank() == 0:
            found[names[id(param)]] = bits.view(torch.float32).view(member.shape).cpu()
        del bits
    for name, param in module.named_parameters():
        if id(param) not in trained and (gather or not hasattr(param, "ds_shape")):
            whole = _gathered(param)
            if dist.get_rank() == 0:
                found[name] = whole.float().cpu()
    if dist.get_rank() == 0:
        found.update({name: buffer.cpu() for name, buffer in module.named_buffers() if persistent(module, name)})
        if gather:
            for name, param in module.named_parameters(remove_duplicate=False):
                found.setdefault(name, found[names[id(param)]])
    return found


def _gathered(param: Any) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_shape")):
        whole: Tensor = param.detach().clone()
        return whole
