"""The attention mask of conversations that lie side by side in a sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def additive_masks() -> Iterator[None]:
    """While a model's forward pass runs, masks for torch's attention are made as its kernels take them.

    transformers makes one of booleans, of which torch makes another in every layer, [micro_batch, 1, seq_len, seq_len]
    of the queries' type, and keeps it until the layer's backward pass. The same numbers are made once here.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS

    make = FUNCTIONS["sdpa"]

    def additive(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor | None:
        mask = make(*args, dtype=dtype, **kwargs)
        if mask is None or mask.dtype != torch.bool:
            return mask
        return torch.where(mask, 0.0, torch.full((), -math.inf, dtype=dtype, device=mask.device))

    FUNCTIONS["sdpa"] = additive
    try:
        yield
    finally:
        del FUNCTIONS["sdpa"]
