"""The attention mask of conversations that lie side by side in a sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def additive_masks() -> Iterator[None]:
    """While a model's forward pass runs, masks for torch's attention are made as its kernels take them.

    transformers makes one of booleans, of which torch makes another in every layer, [micro_batch, 1, seq_len, seq_len]
    of the queries' type, and keeps it until the layer's backward pass. The same numbers are made once here. Under
    torch.autocast that is the type which attention is cast to: a mask of another one would be cast in every layer.

    What makes masks may be somebody else's, registered for this package's transformers alone: it is wrapped, and back
    in its place afterwards.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS

    make = FUNCTIONS["sdpa"]

    def additive(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor | None:
        mask = make(*args, dtype=dtype, **kwargs)
        if mask is None or mask.dtype != torch.bool:
            return mask
        kind = mask.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on "meta"
        computed = torch.get_autocast_dtype(kind) if autocast else dtype
        return torch.where(mask, 0.0, torch.full((), -math.inf, dtype=computed, device=mask.device))

    registered = False
    with suppress(KeyError):  # what transformers itself brings is not there to be removed
        del FUNCTIONS["sdpa"]
        registered = True
    FUNCTIONS["sdpa"] = additive
    try:
        yield
    finally:
        del FUNCTIONS["sdpa"]
        if registered:
            FUNCTIONS["sdpa"] = make
