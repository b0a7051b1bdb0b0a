"""What classes of torch and DeepSpeed take, which a JSON names."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any


def arguments_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What `target` takes beside its first argument, the parameters or the optimizer."""
    return dict(list(inspect.signature(target).parameters.items())[1:])


def is_number(value: Any, *, at_least: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= at_least


def torch_names(module: str, base: str) -> list[str]:
    """The public classes in `module` that derive from its class `base`."""
    namespace = importlib.import_module(module)
    parent = getattr(namespace, base)
    return [
        name
        for name, found in vars(namespace).items()
        if inspect.isclass(found) and issubclass(found, parent) and found is not parent and not name.startswith("_")
    ]
