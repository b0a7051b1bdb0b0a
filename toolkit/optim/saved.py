"""State that was saved, taken over as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.state.layout import dtype_name


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
