"""Memory-efficient training with DeepSpeed: AMCS and SOAM with compressed, ZeRO-partitioned state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["initialize", "register"]

if TYPE_CHECKING:
    from toolkit.zero import initialize, register


def __getattr__(name: str) -> Any:
    # DeepSpeed takes seconds to import; it is loaded when a name that needs it is first used.
    if name in __all__:
        import toolkit.zero

        return getattr(toolkit.zero, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
