"""Run configurations: find a DeepSpeed JSON, change values in it, check the whole before anything loads."""

from toolkit.config.automatic import Shape, settle
from toolkit.config.deepspeed import DeepSpeedSettings
from toolkit.config.files import ShippedConfig, apply_overrides, load_config, names_in_short, shipped_configs
from toolkit.config.validate import remarks, validate

__all__ = [
    "DeepSpeedSettings",
    "Shape",
    "ShippedConfig",
    "apply_overrides",
    "load_config",
    "names_in_short",
    "remarks",
    "settle",
    "shipped_configs",
    "validate",
]
