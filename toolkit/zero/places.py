"""Weights that are built where the optimizer of ZeRO stages 1 and 2 has them.

DeepSpeed lays each parameter group out in one flat tensor. Made beside the weights that it is filled from, that of a
large group is most of a second model: with many ranks or small states, more than the rest of a run takes. A model that
is built for these places has its weights as parts of those flat tensors, on the rank's own device, and nothing is
copied. Other models' weights are moved one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from toolkit.optim import param_groups
from toolkit.state.codecs import BLOCK

if TYPE_CHECKING:
    from toolkit.config import DeepSpeedSettings


def places(ds: DeepSpeedSettings) -> Callable[[nn.Module], Callable[[Tensor], Tensor]] | None:
    """For `models.build_model`: where the weights of a model that will be trained with `ds` go.

    None where its optimizer does not lay them out in whole blocks. The ranks must have met.
    """
    return Places if ds.stage in (1, 2) and ds.rule else None


class Places:
    """Memory for the parameters of `model`, which lie on the meta device: uninitialised, in their shape and dtype.

    A group's flat tensor is made for the first of its parameters that is asked for: what was not begun takes nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._groups: dict[int, list[Tensor]] = {}
        self._made: dict[int, Tensor] = {}
        for group in param_groups(model):
            if len({param.dtype for param in group["params"]}) == 1:
                self._groups |= {id(param): group["params"] for param in group["params"]}

    def __call__(self, param: Tensor) -> Tensor:
        if id(param) not in self._groups:
            return torch.empty_like(param, device="cpu")
        if id(param) not in self._made:
            group = self._groups[id(param)]
            device = get_accelerator().current_device_name()
            flat = torch.empty(padded(group, dist.get_world_size()), dtype=param.dtype, device=device)
            self._made |= {id(one): part for one, part in zip(group, _parts(flat, group), strict=True)}
        return self._made.pop(id(param))


def padded(params: Sequence[Tensor], ranks: int) -> int:
    """Elements of the flat tensor of `params`, of which each rank's part is whole blocks."""
    return -(-sum(param.numel() for param in params) // (BLOCK * ranks)) * BLOCK * ranks


def laid_out(params: Sequence[Tensor], ranks: int) -> Tensor:
    """The flat tensor of `params`, detached: the memory that they fill, or a new one that they are moved into."""
    first, size = params[0], padded(params, ranks)
    storage, start = first.untyped_storage(), 0
    if storage.nbytes() == size * first.element_size() and not first.is_shared():  # by processes
        for param in params:
            if param.untyped_storage()._cdata != storage._cdata or param.storage_offset() != start:
                break
            start += param.numel()
        else:
            flat = first.detach().as_strided((size,), (1,), 0)
            if all(param.is_contiguous() for param in params) and not flat[start:].any():
                return flat
    flat = torch.empty(size, dtype=first.dtype, device=first.device)
    for param, part in zip(params, _parts(flat, params), strict=True):
        param.data = part.copy_(param.data)  # on a CPU no more than one is there twice
    return flat


def _parts(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Views of `flat` in the shapes of `params`, one after the other; what is left of it becomes zero."""
    *parts, rest = flat.split([*(param.numel() for param in params), flat.numel() - sum(p.numel() for p in params)])
    rest.zero_()
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]
