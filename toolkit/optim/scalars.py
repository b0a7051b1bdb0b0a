"""What a step gives the kernel beside tensors: a few numbers of every parameter group, in one transfer for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Known = dict[tuple[Any, ...], Any]
"""What the tensors of one training step have in common, made when the first of them asks. Among it their scalars with
their names, by number of the parameter group, step and device."""

_ALIGNED = 16
"""Those of a group begin at a multiple of so many: compiled code copies what does not begin at 16 bytes."""


def in_one_tensor(groups: Mapping[int, Mapping[str, float]], t: int, device: torch.device) -> Known:
    """The scalars of `groups`, by their numbers, at step `t`: fp32, views of one tensor on `device`."""
    values: list[float] = []
    places = []
    for named in groups.values():
        places.append(slice(len(values), len(values) + len(named)))
        values += named.values()
        values += [0.0] * (-len(values) % _ALIGNED)
    tensor = torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
    pairs = zip(groups.items(), places, strict=True)
    return {(number, t, device): (tuple(named), tensor[place]) for (number, named), place in pairs}
