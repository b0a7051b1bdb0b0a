"""Models: named shapes, configurations, parameter counts, and construction."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from toolkit.models.flops import flops_per_token, peak_flops
from toolkit.models.presets import PRESETS, Preset, check_length, load_config

if TYPE_CHECKING:
    from toolkit.models import cpu_matmul
    from toolkit.models.build import CausalLM, build_model, count_parameters, predictions

__all__ = [
    "PRESETS",
    "CausalLM",
    "Preset",
    "build_model",
    "check_length",
    "count_parameters",
    "cpu_matmul",
    "flops_per_token",
    "load_config",
    "peak_flops",
    "predictions",
]


def __getattr__(name: str) -> Any:
    # Names of presets are completed in a shell, where nobody waits for torch.
    if name == "cpu_matmul":
        return importlib.import_module("toolkit.models.cpu_matmul")
    if name in __all__:
        return getattr(importlib.import_module("toolkit.models.build"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
