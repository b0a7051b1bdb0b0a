"""Sizes as people write them."""

from __future__ import annotations

import re

from toolkit.errors import UserError

_UNITS = {"b": 1, "": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}


def parse_size(text: str, *, where: str) -> int:
    """Bytes of "80GB" (powers of 1000) or "80GiB" (powers of 1024); a bare number is bytes.

    Raises:
        UserError: `text`, which `where` gave, is no size above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else None
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"{where} is {text!r}, but must be a size such as 80GB (powers of 1000) or 80GiB (of 1024).")
    return round(float(match[1]) * _UNITS[unit])
