"""Shipped configs with a value changed, and the sentence that refuses one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from toolkit.config import apply_overrides, load_config, validate
from toolkit.errors import UserError


def refusal(config: Mapping[str, Any], world_size: int | None = None) -> str:
    """The sentence that `validate` raises."""
    with pytest.raises(UserError) as caught:
        validate(config, origin="my.json", world_size=world_size)
    return str(caught.value)


def changed(name: str, *assignments: str) -> dict[str, Any]:
    return apply_overrides(load_config(name), assignments)
