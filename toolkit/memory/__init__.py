"""Memory during a run: watermarks, traces of a step, and the page about memory that ran out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["count_from_here", "watch"]

if TYPE_CHECKING:
    from toolkit.memory.attach import watch
    from toolkit.memory.trace import count_from_here


def __getattr__(name: str) -> Any:
    # `import toolkit` stays quick: torch is loaded where memory is measured.
    if name == "watch":
        from toolkit.memory.attach import watch

        return watch
    if name == "count_from_here":
        from toolkit.memory.trace import count_from_here

        return count_from_here
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
