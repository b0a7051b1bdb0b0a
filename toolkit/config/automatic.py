"""What "auto" means in `zero_optimization`: sizes that follow from the device, the model and the number of ranks.

On a CPU they bound memory, which is all that they change there. On a GPU they are chosen so that a model is sent in
tens of messages and not in hundreds, and that at stage 3 a layer is gathered while the one before it computes. The
rules for GPUs are choices, not measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_SMALL = 2**22
_SECTION = "zero_optimization"


@dataclass(frozen=True)
class Shape:
    """Elements of a model: of all its parameters, of its largest layer, of its largest parameter."""

    total: int
    layer: int
    largest: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """Of `model`, on any device and partitioned or not. Its layers are the members of its `ModuleList`s; without
        any, its largest parameter counts as its largest layer."""
        from torch import nn

        def numel(module: nn.Module) -> int:
            return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())

        largest = max((getattr(p, "ds_numel", p.numel()) for p in model.parameters()), default=0)
        layers = (numel(layer) for part in model.modules() if isinstance(part, nn.ModuleList) for layer in part)
        return cls(numel(model), max(layers, default=0) or largest, largest)


def values(stage: int, shape: Shape, *, on_gpu: bool, world_size: int) -> dict[str, int | bool]:
    """What each key of `zero_optimization` that has a rule is where it is "auto".

    Args:
        stage: of ZeRO.
        on_gpu: whether the model computes on an accelerator.
        world_size: ranks in all.
    """
    bucket = min(max(shape.total // 16, _SMALL), 2**26) if on_gpu else _SMALL
    live = max(2 * shape.layer + shape.largest, 2**26) if on_gpu else 2**26
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": stage == 3 or (on_gpu and world_size > 1),
        "stage3_prefetch_bucket_size": max(shape.layer, _SMALL) if on_gpu else _SMALL,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "sub_group_size": 2**27 if on_gpu else 2**24,
    }


_HAVE_RULES = frozenset(values(0, Shape(0, 0, 0), on_gpu=False, world_size=1))


def automatic(config: Mapping[str, Any]) -> Iterator[str]:
    """The keys of `config`'s `zero_optimization` that are "auto" and have a rule."""
    section = config.get(_SECTION)
    if isinstance(section, Mapping):
        yield from (key for key, value in section.items() if value == "auto" and key in _HAVE_RULES)


def settle(config: Mapping[str, Any], shape: Callable[[], Shape], *, on_gpu: bool, world_size: int) -> dict[str, Any]:
    """A copy of a DeepSpeed JSON whose `zero_optimization` has numbers where it had "auto".

    Other keys that are "auto" stay so. `shape` is called only where it is needed; for the rest see `values`.
    """
    keys = list(automatic(config))
    if not keys:
        return dict(config)
    section = config[_SECTION]
    stage = section.get("stage", 0)
    found = values(stage if isinstance(stage, int) else 0, shape(), on_gpu=on_gpu, world_size=world_size)
    return {**config, _SECTION: {**section, **{key: found[key] for key in keys}}}
