"""The weights that an optimizer trains, for tests on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def whole(optimizer: Any, p: nn.Parameter) -> Tensor:
    """The fp32 weights: those of `p`, with their remainder if there is one."""
    state = optimizer.state[p]
    group = next(group for group in optimizer.param_groups if any(p is member for member in group["params"]))
    remainder = optimizer.layout(group, p.dtype).remainder
    if remainder is None:
        return p.detach()
    parts = [value for key, value in state.items() if key.split(".")[0] == "remainder"]
    flat = p.detach().flatten()
    low = (part.flatten()[: flat.numel()] for part in remainder.unpacked(*parts))
    return remainder.join(flat, *low).view(p.shape)
