"""What an optimizer's constructor is given: hyper-parameters of its rule, options of its own, and tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from toolkit.errors import UserError, nearest
from toolkit.optim.rule import Rule
from toolkit.state.layout import DEFAULT_FORMAT, check_dtype, default_weights
from toolkit.state.remainders import DEFAULT_WEIGHTS

OPTIONS: dict[str, Any] = {
    "state_format": DEFAULT_FORMAT,
    "weights": DEFAULT_WEIGHTS,
    "seed": 0,
    "release_gradients": False,
    "compile": True,
}
"""Constructor keywords that belong to the optimizer, not to the rule, with their defaults."""


def bind(optimizer: type[torch.optim.Optimizer], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    known = [key for key in inspect.signature(optimizer).parameters if key != "params"]
    positional = dict(zip(known, args, strict=False))
    if len(args) > len(known) or positional.keys() & kwargs.keys():
        raise TypeError(f"{optimizer.__name__} got a hyper-parameter twice or too many of them: {args}, {dict(kwargs)}")
    given = positional | dict(kwargs)
    for key in given:
        if key not in known:
            raise UserError(
                f"{optimizer.__name__}: unknown hyper-parameter {key!r}; known are {', '.join(known)}."
                f"{nearest(key, known)}"
            )
    options = OPTIONS | {"weights": default_weights(given.get("state_format"))} | given
    for key in ("compile", "release_gradients"):
        if not isinstance(options[key], bool):
            raise UserError(f"{optimizer.__name__}: {key} must be true or false, not {options[key]!r}")
    if type(options["seed"]) is not int or options["seed"] < 0:
        raise UserError(f"{optimizer.__name__}: seed must be a whole number, 0 or more, not {options['seed']!r}")
    return options


def separate(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's own options, and the rule's hyper-parameters."""
    own = {key: value for key, value in options.items() if key in OPTIONS}
    return own, {key: value for key, value in options.items() if key not in OPTIONS}


def fields(rule: type[Rule], values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in rule.model_fields if key in values}


def check_tensor(tensor: Any, where: str) -> None:
    """Raise UserError for tensors that would train wrongly."""
    if isinstance(tensor, Tensor) and tensor.requires_grad:
        check_dtype(tensor.dtype, where)
        if is_traceable_wrapper_subclass(tensor):
            raise UserError(
                f"{where}: a tensor of shape {list(tensor.shape)} is a {type(tensor).__name__} and not a plain one "
                "(FSDP2's fully_shard and tensor parallelism make DTensors); shard with DeepSpeed's ZeRO instead, "
                "through toolkit.initialize"
            )


def as_list(params: Any) -> list[Any]:
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, Iterable) and not isinstance(params, (set, frozenset, str)):
        return list(params)
    raise UserError(f"params must be a tensor or an ordered collection of tensors, not {type(params).__name__}")
