"""What training holds in memory: before a run, during it and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["count_from_here", "watch"]

if TYPE_CHECKING:
    from toolkit.memory.start import watch
    from toolkit.memory.trace import count_from_here


def __getattr__(name: str) -> Any:
    # A report is written without torch; what measures needs it.
    if name == "watch":
        from toolkit.memory.start import watch

        return watch
    if name == "count_from_here":
        from toolkit.memory.trace import count_from_here

        return count_from_here
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
