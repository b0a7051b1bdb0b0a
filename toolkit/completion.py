"""What the shell completes: names that a value may have, found without loading torch."""

from __future__ import annotations

from toolkit.config.files import shipped_configs
from toolkit.models.presets import PRESETS


def config_names(incomplete: str) -> list[str]:
    """Shipped configurations."""
    return [name for name in shipped_configs() if name.startswith(incomplete)]


def model_names(incomplete: str) -> list[str]:
    """Model presets."""
    return [name for name in PRESETS if name.startswith(incomplete)]
