"""Sizes and speeds as people write them."""

from __future__ import annotations

import re

from toolkit.errors import UserError

_UNITS = {"b": 1}
_UNITS |= {f"{prefix}{end}": 1000**power for power, prefix in enumerate("kmgt", start=1) for end in ("", "b")}
_UNITS |= {f"{prefix}i{end}": 1024**power for power, prefix in enumerate("kmgt", start=1) for end in ("", "b")}
_MOST_GB = 10_000
"""A bare number above that is no number of GB, but of bytes or MiB: which, only the user knows."""


def parse_size(text: str, *, where: str) -> int:
    """Bytes of "80GB" or "80G" (powers of 1000), "80GiB" or "80Gi" (powers of 1024), or a bare "80", which is GB.

    Raises:
        UserError: `text`, which `where` gave, is no size above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = (match[2].lower() or "gb") if match else None
    if match is None or unit not in _UNITS or round(float(match[1]) * _UNITS[unit]) < 1:
        raise UserError(f"{where} is {text!r}, but must be a size such as 80GB (powers of 1000) or 80GiB (of 1024).")
    if not match[2] and float(match[1]) > _MOST_GB:
        raise UserError(f"{where} is {text!r}, which as GB is too much; give the unit, such as {text.strip()}MiB.")
    return round(float(match[1]) * _UNITS[unit])


SHOWN_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
"""The units that sizes are shown in, and their bytes."""


def counted(count: float, one: str, many: str = "") -> str:
    """A number of things: "1 step", "2,000 steps"; `many` where the plural is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def size_text(count: float) -> str:
    """A number of bytes in GB, MB or kB (powers of 1000)."""
    for unit, factor in SHOWN_UNITS:
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def flops_text(count: float) -> str:
    """A number of floating-point operations a second in PFLOP/s, TFLOP/s, GFLOP/s or MFLOP/s."""
    for unit, factor in (("PFLOP/s", 1e15), ("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e6:.2f} MFLOP/s"
