"""The tensors that a step is measured on: one large one, several, or those of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import UserError

WIDTH = 1024
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(text: str, *, where: str) -> int:
    """The number of "33.5M", "1B", "4096".

    Raises:
        UserError: `text`, which `where` gave, is no number above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbB]?)\s*", text)
    count = round(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if count < 1:
        raise UserError(f"{where} is {text!r}, but must be a number of parameters such as 33.5M, 1B or 4096.")
    return count


def count_text(count: int) -> str:
    """As people write it: 33.5M."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)


@dataclass(frozen=True)
class Group:
    """Tensors that are treated alike, and the options of their parameter group."""

    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Shapes:
    """All tensors, in their groups."""

    groups: tuple[Group, ...]

    @property
    def all(self) -> list[tuple[int, ...]]:
        return [shape for group in self.groups for shape in group.shapes]

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.all)

    @property
    def tensors(self) -> int:
        return len(self.all)

    def tensors_like(self, dtype: torch.dtype, device: str, scale: float) -> list[Tensor]:
        """Random tensors of these shapes, the same at every call."""
        generator = torch.Generator(device).manual_seed(0)
        return [torch.randn(shape, dtype=dtype, device=device, generator=generator) * scale for shape in self.all]

    def param_groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        """Groups for an optimizer of this package, of `parameters` in the order of `all`."""
        rest = iter(parameters)
        return [group.options | {"params": [next(rest) for _ in group.shapes]} for group in self.groups]


def even(parameters: int, tensors: int = 1) -> Shapes:
    """About `parameters` elements (a multiple of `WIDTH`, if there are so many) in tensors of one shape."""
    size = max(parameters // tensors, 1)
    shape = (max(size // WIDTH, 1), WIDTH) if size >= WIDTH else (1, size)
    return Shapes((Group((shape,) * tensors, {}),))


def of_model(name: str) -> Shapes:
    """The parameters of a model, in groups by component.

    Raises:
        UserError: there is no such model.
    """
    from toolkit.models.build import blueprint
    from toolkit.optim import param_groups

    groups = param_groups(blueprint(name, dtype=torch.float32))
    return Shapes(
        tuple(
            Group(
                tuple(tuple(tensor.shape) for tensor in group["params"]),
                {key: value for key, value in group.items() if key != "params"},
            )
            for group in groups
        )
    )


def smallest(shapes: Shapes) -> Shapes:
    """As many tensors, in the same groups, each of two blocks at most: what is left of a step is its host's share."""
    from toolkit.state.codecs import BLOCK

    def cut(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if torch.Size(shape).numel() <= 2 * BLOCK else (2, BLOCK)

    return Shapes(tuple(Group(tuple(map(cut, group.shapes)), group.options) for group in shapes.groups))
