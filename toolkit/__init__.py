"""Memory-efficient training with DeepSpeed: AMCS and SOAM with compressed, ZeRO-partitioned state."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["initialize", "register"]
_ROOMS = ("memory", "optim")
"""What is for a program of one's own beside them: `toolkit.memory.watch`, `toolkit.optim.AMCS`, ..."""

if TYPE_CHECKING:
    from toolkit.zero import initialize, register


def __getattr__(name: str) -> Any:
    # DeepSpeed takes seconds to import; it is loaded when a name that needs it is first used.
    if name in __all__:
        import toolkit.zero

        return getattr(toolkit.zero, name)
    if name in _ROOMS:
        return importlib.import_module(f"toolkit.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
