"""What a model has beside the parameters that its optimizer holds: frozen parameters, buffers, modules' extra state."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from toolkit.agreed import agreed
from toolkit.checkpoint.files import is_plain
from toolkit.checkpoint.source import Source
from toolkit.state.layout import dtype_name
from toolkit.state.sharding import whole_shape


class Untrained:
    """Of `module`, all but the parameters whose names are `trained`.

    Non-persistent buffers are not saved, as by torch's state_dict: a model computes them when it is built.
    """

    def __init__(self, module: nn.Module, trained: Collection[str]) -> None:
        self.parameters = {name: param for name, param in module.named_parameters() if name not in trained}
        self.buffers = dict(module.named_buffers(remove_duplicate=False))
        self._computed = {name for name in self.buffers if not persistent(module, name)}
        self._modules = {
            f"{name}._extra_state".removeprefix("."): child
            for name, child in module.named_modules(remove_duplicate=False)
            if type(child).get_extra_state is not nn.Module.get_extra_state
        }

    def refusal(self) -> str | None:
        """Why a checkpoint cannot hold all of it, in half a sentence, or None."""
        problem = self.unsaveable(self.extra_states())
        if problem is not None:
            return problem
        for name, param in self.parameters.items():
            if not param.requires_grad and hasattr(getattr(param, "ds_tensor", None), "ds_quant_scale"):
                return f"{name!r} is quantized by zero_quantized_nontrainable_weights, and cannot be saved"
        return None

    def unsaveable(self, values: Mapping[str, Any]) -> str | None:
        """Which extra state in `values`, by name, a checkpoint cannot hold, in half a sentence, or None."""
        for name, child in self._modules.items():
            if not is_plain(values[name]):
                return (
                    f"{name!r} (of {type(child).__name__}) holds other objects than tensors, numbers, text, lists and "
                    "dicts, and cannot be saved"
                )
        return None

    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the frozen parameters."""
        return {name: whole_shape(param) for name, param in self.parameters.items()}

    def leave(self, names: Collection[str]) -> None:
        """Take these frozen parameters out of what there is: they are kept elsewhere."""
        self.parameters = {name: param for name, param in self.parameters.items() if name not in names}

    def parts(self) -> dict[str, Tensor]:
        """Of each frozen parameter what this rank holds: its part at stage 3, else all of it."""
        return {name: getattr(param, "ds_tensor", param).detach() for name, param in self.parameters.items()}

    def saved_buffers(self) -> dict[str, Tensor]:
        """Persistent buffers as they are on this rank."""
        return {name: buffer for name, buffer in self.buffers.items() if name not in self._computed}

    def extra_states(self) -> dict[str, Any]:
        """What modules return from `get_extra_state` on this rank, by name."""
        return {name: child.get_extra_state() for name, child in self._modules.items()}

    def mismatch(self, source: Source) -> str | None:
        """What is of another shape or has no place here, in half a sentence; None if nothing is."""
        buffers = source.buffers()
        for name, old in (source.frozen | buffers).items():
            new = self.buffers.get(name) if name in buffers else self.parameters.get(name)
            if new is None:
                return f"this model lacks the {'buffer' if name in buffers else 'frozen parameter'} {name!r}"
            if whole_shape(new) != old.shape:
                return f"{name!r} is {list(old.shape)} in the checkpoint and {list(whole_shape(new))} here"
        lacking = source.extra_states().keys() - self._modules.keys()
        return f"this model lacks the extra state {min(lacking)!r}" if lacking else None

    def conversions(self, source: Source) -> list[str]:
        """What is not taken over, or not as it is, a sentence each."""
        there, extra = source.frozen | source.buffers(), source.extra_states()
        here = {**self.parameters, **self.buffers}
        lacking = [name for name in here if name not in there and name not in self._computed]
        lacking += [name for name in self._modules if name not in extra]
        said = []
        if lacking:
            said.append(
                f"the checkpoint lacks {len(lacking)} of the frozen parameters and buffers, {lacking[0]!r} for one, "
                "which stay as they are in this model"
            )
        changed: dict[tuple[str, str], list[str]] = {}
        for name, new in here.items():
            if name in there and not _holds(new.dtype, there[name].dtype):
                changed.setdefault((dtype_name(there[name].dtype), dtype_name(new.dtype)), []).append(name)
        for (old, new_dtype), names in changed.items():
            count = f"{len(names)} of the frozen parameters and buffers"
            said.append(f"{count} were {old} and are {new_dtype}, {names[0]!r} for one")
        return said

    @torch.no_grad()
    def restore(self, source: Source, base: str | None) -> None:
        """Take all of it over from `source`, as far as that has it; every rank must call this.

        `base`: hash of the weights that the frozen parameters were loaded from (`checkpoint.base`), if they were.

        With as many ranks as then, buffers and extra state are each rank's own; else they are rank 0's.

        Raises:
            UserError: the weights beside adapters cannot be read; raised by every rank.
        """
        own = source.own(dist.get_rank()) if source.sharding.world_size == dist.get_world_size() else {}
        there = source.based if source.base is not None and source.base.sha256 == base else ()
        taken = [name for name in self.parameters if name in source.frozen and name not in there]
        # At stage 3 the first rank reads, and each gets its part, wherever that lies (device, host, file).
        read = [name for name in taken if not hasattr(self.parameters[name], "ds_shape") or dist.get_rank() == 0]

        def look() -> None:
            for name in read:
                if name in source.based:
                    source.frozen_weight(name)

        agreed(look)  # a rank that found the base gone, or another, below would leave the others in a gather
        for name in taken:
            param = self.parameters[name]
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=hasattr(param, "ds_shape")):
                if name in read:
                    param.data.copy_(source.frozen_weight(name))
        for name, value in source.buffers().items():
            self.buffers[name].copy_(own.get(name, value))
        for name, value in source.extra_states().items():
            self._modules[name].set_extra_state(copy.deepcopy(own.get(name, value)))


def _holds(new: torch.dtype, old: torch.dtype) -> bool:
    """Whether every number of dtype `old` is one of `new`."""
    return new == old or (new.itemsize > old.itemsize and new.is_floating_point == old.is_floating_point)


def persistent(module: nn.Module, name: str) -> bool:
    """Whether torch's state_dict has the buffer `name`."""
    owner, _, key = name.rpartition(".")
    return key not in module.get_submodule(owner)._non_persistent_buffers_set
