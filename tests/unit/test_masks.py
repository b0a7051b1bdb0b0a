"""The attention mask of conversations: made once, in the type that attention computes in."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import qwen3
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from toolkit.models import build_model
from toolkit.models.masks import additive_masks

BATCH, LENGTH = 2, 24


class Masks(TorchDispatchMode):
    """The types of all tensors of a mask's shape that are made, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        mask = isinstance(found, torch.Tensor) and found.shape == (BATCH, 1, LENGTH, LENGTH)
        if mask and found.is_floating_point() and not func.is_view:
            self.made.append(found.dtype)
        return found


@pytest.mark.parametrize(
    ("model", "autocast", "computed"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_mask_is_made_once_in_the_type_of_attention(
    tmp_path: Path, model: torch.dtype, autocast: torch.dtype | None, computed: torch.dtype
) -> None:
    built = build_model(qwen3(tmp_path), dtype=model, seed=0)
    tokens = torch.randint(0, 96, (BATCH, LENGTH + 1))
    places = torch.arange(LENGTH + 1).remainder(9).expand(BATCH, -1)
    context = torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext()
    with context, Masks() as masks:
        loss = built(torch.stack([tokens, tokens, places], dim=1))
    assert loss.isfinite() and masks.made == [computed]


def test_what_somebody_registered_makes_the_mask_and_stays() -> None:
    asked = []

    def theirs(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs)
        return torch.tensor([True, False])

    whose = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = theirs
    try:
        with additive_masks():
            made = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](dtype=torch.float32)
        assert made.tolist() == [0.0, float("-inf")] and len(asked) == 1
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is theirs
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is whose
    with additive_masks():
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not whose
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is whose
