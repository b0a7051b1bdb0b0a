"""Models: named shapes, configurations, parameter counts, and construction."""

from toolkit.models import cpu_matmul
from toolkit.models.build import CausalLM, build_model, count_parameters, predictions
from toolkit.models.flops import flops_per_token, peak_flops
from toolkit.models.presets import PRESETS, Preset, check_length, load_config

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
