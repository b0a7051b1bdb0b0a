"""State that is kept or was saved, and what it is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.state.layout import dtype_name, format_text

Settled = tuple[dict[str, str], str]
"""Of a parameter group: the format of each state, and how weights are kept."""


def settled(group: Mapping[str, Any]) -> Settled:
    return dict(group["state_format"]), group["weights"]


def check_settled(optimizer: Any) -> None:
    """Raise UserError if a parameter group says that state or weights are kept otherwise than they are."""
    for number, (group, kept) in enumerate(zip(optimizer.param_groups, optimizer.settled, strict=False)):
        for key, was in zip(("state_format", "weights"), kept, strict=True):
            if group[key] != was:
                raise UserError(
                    f"{type(optimizer).__name__}, parameter group {number}: {key} was {format_text(was)!r} when the "
                    f"optimizer was made and is {group[key]!r} now, which changes nothing that is kept; make another "
                    "optimizer with it, or resume a checkpoint with --convert-state"
                )


def fill(state: dict[str, Any], saved: Mapping[str, Any], number: int, dtype: torch.dtype) -> None:
    """Copy what was saved of parameter `number`, whose weights are `dtype`, into its `state`.

    Raises ValueError where it does not have the keys, shapes and dtypes of `state`.
    """
    surplus = sorted(saved.keys() - state.keys())
    if surplus:
        raise ValueError(
            f"saved optimizer state of parameter {number} has {', '.join(surplus)}, which this optimizer does not keep "
            f"for {dtype_name(dtype)} weights"
        )
    for key, value in state.items():
        given = saved.get(key)
        if isinstance(value, Tensor):
            if given is None or given.shape != value.shape or given.dtype != value.dtype:
                found = f"{given.dtype} {list(given.shape)}" if given is not None else "nothing"
                raise ValueError(
                    f"saved optimizer state {key!r} of parameter {number} is {found}, but this optimizer keeps "
                    f"{value.dtype} {list(value.shape)}; was it saved with another state_format or model?"
                )
            value.copy_(given)
        elif given is None:
            raise ValueError(f"saved optimizer state of parameter {number} lacks {key!r}")
        else:
            state[key] = int(given)
