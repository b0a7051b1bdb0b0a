"""What `deepspeed.utils.safe_get_full_fp32_param`, `safe_set_full_optimizer_state` and their siblings read and write.

DeepSpeed's own take the tensor that is stepped. Here that is this rank's part of the model's bf16 weights, without the
bits below their last one: what was set would lose these, and at stages 1 and 2 every rank would compute with another
model until the next step. State is in codes, which DeepSpeed takes for numbers.

What is set here is what the model computes with at once, on all ranks alike, which all have to call it.
"""

from __future__ import annotations

from functools import cached_property
from types import MethodType
from typing import Any
from weakref import ref

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from toolkit.errors import UserError, nearest
from toolkit.optim import RuleOptimizer
from toolkit.state.codecs import BLOCK, pack
from toolkit.state.layout import REMAINDER, Layout, State
from toolkit.state.remainders import Remainder
from toolkit.state.sharding import Fragment, whole_shape
from toolkit.zero.shards import Member, Shard

_NOT_TRAINED = (
    "{} is not trained, so that no optimizer holds it; write to it itself, at ZeRO stage 3 within "
    "deepspeed.zero.GatheredParameters with a modifier_rank"
)

NO_GRADIENTS = "gradients are there from the backward pass of the last micro-batch to the step, and not before or after"


def values(zero: Any, shard: Shard, own: Fragment) -> Tensor:
    """What this rank trains of `own`, a part of `shard`, fp32: weights joined with their remainders.

    `zero` may be DeepSpeed's own optimizer.
    """
    weights = shard.tensor.detach()[own.elements]
    if weights.dtype != torch.bfloat16 or not isinstance(zero.optimizer, RuleOptimizer):
        return weights.float()
    kept = zero.optimizer.layout(zero.optimizer.param_groups[shard.group], weights.dtype)
    state = zero.optimizer.state.get(shard.tensor, {})
    if not state:  # nothing has been trained yet
        return weights.float()
    assert kept.remainder is not None
    low = kept.remainder.unpacked(*(state[key][own.blocks] for key in kept.keys(REMAINDER)))
    joined: Tensor = kept.remainder.join(weights, *(part.reshape(-1)[_lanes(own)] for part in low))
    return joined


def bits_of(member: Member, mine: Tensor | None) -> Tensor:
    """`mine`, this rank's part of a parameter, as bit patterns of fp32 in a whole one of zeros, flat.

    The sum of all ranks' is exact, the sign of zero included.
    """
    bits = torch.zeros(member.shape.numel(), dtype=torch.int32, device=get_accelerator().current_device_name())
    if member.fragment is not None and mine is not None:
        own = mine[: member.fragment.numel].to(bits.device, torch.float32).contiguous()
        bits[member.fragment.start : member.fragment.stop] = own.view(torch.int32)
    return bits


def _lanes(own: Fragment) -> slice:
    """Where `own` lies in its blocks, flat."""
    first = own.blocks.start * BLOCK
    return slice(own.offset - first, own.offset + own.numel - first)


class Access:
    """In front of DeepSpeed's ZeRO optimizers: weights and state of single parameters, whole, in fp32."""

    optimizer: RuleOptimizer
    param_names: dict[Any, str]
    _shards: list[Shard]

    @cached_property
    def written(self) -> set[int]:
        """Ids of parameters that were set since the last step, for `changes.py`."""
        return set()

    @cached_property
    def _placed(self) -> dict[int, tuple[Shard, Member]]:
        """Of each trained parameter, by id, where it is."""
        return {id(member.param): (shard, member) for shard in self._shards for member in shard.members}

    # ---- stages 1 and 2: methods of parameters --------------------------------------------------------------------

    def _link_all_hp_params(self) -> None:
        super()._link_all_hp_params()  # type: ignore[misc]
        zero = ref(self)  # a model may outlive its engine

        def get_full_hp_param(param: Any, optim_state_key: str | None = None) -> Tensor:
            return _alive(zero()).get_full_hp_param(param, optim_state_key)

        def set_full_hp_param(param: Any, value: Tensor, optim_state_key: str | None = None) -> None:
            _alive(zero()).set_full_hp_param(value, param, optim_state_key)

        def get_full_hp_grad(param: Any) -> Tensor | None:
            return _alive(zero()).get_fp32_grad_for_param(param)

        def set_full_hp_grad(param: Any, value: Tensor) -> None:
            _alive(zero()).set_fp32_grad_for_param(value, param)

        for shard in self._shards:
            for member in shard.members:
                if hasattr(member.param, "_hp_mapping"):
                    for method in (get_full_hp_param, set_full_hp_param, get_full_hp_grad, set_full_hp_grad):
                        setattr(member.param, method.__name__, MethodType(method, member.param))

    # ---- what DeepSpeed calls, at stage 3 by these names ----------------------------------------------------------

    @torch.no_grad()
    def get_full_hp_param(self, param: Any, optim_state_key: str | None = None) -> Tensor | None:
        """The weights of a parameter, or a state of it, fp32, in its shape; None for a frozen one."""
        return self.whole_of(param, self._part(param, optim_state_key)) if self.trains(param) else None

    @torch.no_grad()
    def set_full_hp_param(self, value: Tensor, param: Any, optim_state_key: str | None = None) -> None:
        """The inverse of `get_full_hp_param`, as far as the codes of a state go."""
        mine, whole = self.part_of(param, value), value.detach().reshape(-1)
        shard, member = self._placed[id(param)]
        if optim_state_key is not None:
            if not self._state(shard, optim_state_key).signed and bool((whole < 0).any()):
                raise UserError(
                    f"the state {optim_state_key!r} is a mean of squares, but the value to set has negative elements"
                )
            if member.fragment is not None:
                self._write_state(shard, member.fragment, optim_state_key, mine)
            return
        remainder = self._layout(shard).remainder
        split = remainder.split if remainder is not None else lambda weight: (weight,)
        if member.fragment is not None:
            weight, *low = split(mine.float())
            shard.tensor.data[member.fragment.elements] = weight.to(shard.tensor)
            if remainder is not None:
                self._write_remainder(shard, member.fragment, remainder, low)
        self._show_whole(param, split(whole.to(get_accelerator().current_device_name(), torch.float32))[0])

    @torch.no_grad()
    def get_local_fp32_param(self, param: Any, optim_state_key: str | None = None) -> Tensor | None:
        """This rank's part, flat, at stage 3; without the elements behind a parameter's end."""
        return self._part(param, optim_state_key) if self.trains(param) else None

    @torch.no_grad()
    def set_local_hp_param(self, value: Tensor, param: Any, optim_state_key: str | None = None) -> None:
        """As `set_full_hp_param`, each rank with its own part."""
        self.set_full_hp_param(self.whole_of(param, value.detach().reshape(-1).float()), param, optim_state_key)

    @torch.no_grad()
    def get_fp32_grad_for_param(self, param: Any) -> Tensor | None:
        """The gradient that the next step has of a parameter, fp32, in its shape; None for a frozen one."""
        return self.whole_of(param, self._this_steps(param)) if self.trains(param) else None

    @torch.no_grad()
    def set_fp32_grad_for_param(self, value: Tensor, param: Any) -> None:
        """Put another gradient in its place."""
        own, part = self.part_of(param, value), self._this_steps(param)
        if part is not None:
            part[: own.numel()] = own.to(part)

    @torch.no_grad()
    def get_local_fp32_grad_for_param(self, param: Any) -> Tensor | None:
        part = self._this_steps(param) if self.trains(param) else None
        return part if part is None else part.float()

    @torch.no_grad()
    def set_local_grad_for_param(self, value: Tensor, param: Any) -> None:
        part = self._this_steps(param)
        if part is not None:
            part[: value.numel()] = value.reshape(-1).to(part)

    def update_fp32_grad_for_param_vectorized(self, update_func: Any, param_list: list[Any]) -> None:
        for param in param_list:
            if self.trains(param):
                self.set_fp32_grad_for_param(update_func(self.get_fp32_grad_for_param(param), param), param)

    @property
    def is_open(self) -> bool:
        """Whether gradients wait for the end of a backward pass."""
        raise NotImplementedError

    def _this_steps(self, param: Any) -> Tensor | None:
        """This rank's part of the gradient that the next step has of `param`, flat; None: no part.

        Raises UserError, on all ranks alike, where there are no gradients.
        """
        raise NotImplementedError

    # ---- what they are made of ------------------------------------------------------------------------------------

    def trains(self, param: Any) -> bool:
        """Whether the optimizer steps `param`."""
        return id(param) in self._placed

    def whole_of(self, param: Any, mine: Tensor | None) -> Tensor:
        """A whole parameter, in its shape, of the parts that ranks have, fp32, flat, with or without padding."""
        _, member = self._trained(param)
        bits = bits_of(member, mine)
        dist.all_reduce(bits, group=member.process_group)
        return bits.view(torch.float32).view(member.shape)

    def part_of(self, param: Any, value: Tensor) -> Tensor:
        """This rank's part of a whole `value`, flat; empty where it holds none."""
        _, member = self._trained(param)
        if value.numel() != member.shape.numel():
            raise UserError(
                f"{self._named(param)} is {list(member.shape)}, but the value to set is {list(value.shape)}"
            )
        own = member.fragment
        return value.detach().reshape(-1)[own.start : own.stop] if own is not None else value.new_empty(0)

    # ---- this rank's part -----------------------------------------------------------------------------------------

    def _named(self, param: Any) -> str:
        return str(self.param_names.get(param, "a parameter"))

    def _trained(self, param: Any) -> tuple[Shard, Member]:
        if id(param) not in self._placed:
            raise UserError(_NOT_TRAINED.format(self._named(param)))
        return self._placed[id(param)]

    def _layout(self, shard: Shard) -> Layout:
        return self.optimizer.layout(self.optimizer.param_groups[shard.group], shard.tensor.dtype)

    def _state(self, shard: Shard, key: str) -> State:
        known = {state.name: state for state in self._layout(shard).states}
        if key not in known:
            raise UserError(
                f"{type(self.optimizer).__name__} keeps no state {key!r} of each element here; it keeps "
                f"{', '.join(known) or 'none'}.{nearest(key, list(known))}"
            )
        return known[key]

    def _part(self, param: Any, key: str | None) -> Tensor | None:
        """What this rank holds of the weights of a parameter or of a state, fp32, flat; None: nothing."""
        shard, member = self._placed[id(param)]
        if key is not None:
            self._state(shard, key)
        own = member.fragment
        if own is None:
            return None
        if key is None:
            return values(self, shard, own)
        return self._states(shard, own)[key].reshape(-1)[_lanes(own)]

    def _states(self, shard: Shard, own: Fragment) -> dict[str, Tensor]:
        kept, held = self._layout(shard), self._held_state(shard)
        return kept.decode({key: held[key][own.blocks] for key, _ in kept.specs})

    def _held_state(self, shard: Shard) -> dict[str, Tensor]:
        return self.optimizer.allocate(shard.tensor, self._layout(shard))

    def _write_state(self, shard: Shard, own: Fragment, key: str, value: Tensor) -> None:
        kept, held = self._layout(shard), self._held_state(shard)
        states = self._states(shard, own)
        states[key].reshape(-1)[_lanes(own)] = value.to(states[key].device)
        for name, codes in kept.encode(states).items():
            held[name][own.blocks] = codes

    def _write_remainder(self, shard: Shard, own: Fragment, remainder: Remainder, low: list[Tensor]) -> None:
        held = self._held_state(shard)
        stored = [held[key][own.blocks] for key in self._layout(shard).keys(REMAINDER)]
        for lanes, part in zip(remainder.unpacked(*stored), low, strict=True):
            lanes.reshape(-1)[_lanes(own)] = part.to(lanes.device)
            if remainder.bits == 4:  # `unpacked` has made a copy
                stored[0].copy_(pack(lanes.split(BLOCK // 2, dim=1))[0])

    def _show_whole(self, param: Any, weight: Tensor) -> None:
        """Give the model the weights of a parameter, flat, wherever it holds any of them."""
        part = getattr(param, "ds_tensor", None)
        if part is not None:
            start = dist.get_rank(param.ds_process_group) * part.numel()
            own = weight[start : start + part.numel()]
            if part.data.numel():  # else they lie on NVMe, and the next step brings what was set
                part.data.view(-1)[: own.numel()] = own.to(part)
        if part is None or param.ds_status == ZeroParamStatus.AVAILABLE:
            param.data.copy_(weight.view(whole_shape(param)))
        if getattr(param, "ds_secondary_tensor", None) is not None:
            param.ds_secondary_tensor = None  # hpZ's copy; the next forward pass makes it anew
        self.written.add(id(param))


def link(engine: Any) -> set[int]:
    """Let DeepSpeed's functions reach the parameters of `engine` that no shard holds, or say why they cannot.

    They pass over these in silence. Returns where ids of parameters that have been set are noted, for `changes.py`.
    """
    zero = engine.optimizer
    written: set[int] = zero.written if isinstance(zero, Access) else set()
    if not isinstance(engine.basic_optimizer, RuleOptimizer) or engine.zero_optimization_partition_weights():
        return written
    for name, param in engine.module.named_parameters():
        if isinstance(zero, Access) and zero.trains(param):
            continue
        if hasattr(param, "_hp_mapping"):  # of BF16_Optimizer, which shows the model what was set in the next step
            _show_at_once(param, written)
        elif not param.requires_grad:
            _Alone(param, _NOT_TRAINED.format(name))
        elif zero is engine.basic_optimizer:
            _Alone(param, None)
        else:
            _Alone(param, f"{type(zero).__name__} holds {name} in fp32 without a way to it; use ZeRO stage 1, 2 or 3")
    return written


class _Alone:
    """DeepSpeed's functions on a parameter that is its own master weight, or that has none, which is refused.

    In a pickle of the parameter it is without use: it holds no more than a weak reference to it.
    """

    def __init__(self, param: Any, refusal: str | None) -> None:
        self._param, self._refusal = ref(param), refusal
        param._hp_mapping = None
        for method in (self.get_full_hp_param, self.set_full_hp_param, self.get_full_hp_grad, self.set_full_hp_grad):
            setattr(param, method.__name__, method)

    def __reduce__(self) -> Any:
        return object.__new__, (_Alone,)

    def _checked(self, key: str | None) -> Any:
        if self._refusal is not None:
            raise UserError(self._refusal)
        if key is not None:
            raise UserError("without ZeRO there is the optimizer's own `state`, by parameter; read and write that")
        return _alive(self._param())

    def get_full_hp_param(self, optim_state_key: str | None = None) -> Tensor | None:
        if self._refusal is not None:
            return None  # as DeepSpeed's
        return self._checked(optim_state_key).detach().float().clone()

    def set_full_hp_param(self, value: Tensor, optim_state_key: str | None = None) -> None:
        param = self._checked(optim_state_key)
        param.data.copy_(value.view(param.shape))

    def get_full_hp_grad(self) -> None:
        """Asked where `grad` is None."""

    def set_full_hp_grad(self, value: Tensor) -> None:
        param = self._checked(None)
        param.grad = value.detach().to(param, copy=True).view(param.shape)


def _show_at_once(param: Any, written: set[int]) -> None:
    set_master = param.set_full_hp_param

    def set_full_hp_param(self: Any, value: Tensor, optim_state_key: str | None = None) -> None:
        set_master(value, optim_state_key)
        if optim_state_key is None:
            self.data.copy_(value.view(self.shape))
            written.add(id(self))

    param.set_full_hp_param = MethodType(set_full_hp_param, param)


def _alive(zero: Any) -> Any:
    if zero is None:
        raise UserError("the engine that trained this parameter is gone, and with it what it held in fp32")
    return zero
