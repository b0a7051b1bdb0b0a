"""Optimizers of other packages, which `optimizer.type` names by their import path: "bitsandbytes.optim.AdamW8bit"."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from toolkit.config.signatures import arguments_of
from toolkit.errors import UserError, nearest
from toolkit.sentences import one_line, shown, unknown_key

if TYPE_CHECKING:
    import torch


def is_outside(kind: str | None) -> bool:
    """Whether `optimizer.type` is an import path."""
    return kind is not None and "." in kind


def outside_optimizer(kind: str) -> type[torch.optim.Optimizer]:
    """The class that the import path `kind` names.

    Only installed packages are imported: a JSON must not run what lies in the working folder.

    Raises:
        UserError: there is no such package, module or class, or it is no optimizer.
    """
    import torch

    module, _, name = kind.rpartition(".")
    package = module.partition(".")[0]
    place = f"optimizer.type {kind!r}"
    if package not in metadata.packages_distributions():
        raise UserError(f"{place} needs {package!r}, which is no installed package.")
    try:
        names = vars(importlib.import_module(module))
    except Exception as error:  # whatever its import runs into
        raise UserError(f"{place}: {module} cannot be imported: {type(error).__name__}: {one_line(error)}") from None
    classes = {
        key: value
        for key, value in names.items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    if name not in classes:
        raise UserError(f"{place}: {module} has no class of optimizers {name!r}.{nearest(name, classes)}")
    return classes[name]


def check_outside(kind: str, params: Mapping[str, Any]) -> None:
    """Check that the class takes `params`, and on a machine without accelerator that it makes a step there.

    Raises UserError.
    """
    import torch

    made = outside_optimizer(kind)
    accepted = arguments_of(made)
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values()):
        for name in params:
            if name not in accepted:
                raise UserError(unknown_key(["optimizer", "params", name], accepted, "hyper-parameter"))
    flat = " on a flat tensor, which is what ZeRO hands over,"
    try_step(kind, made, params, (8,), where=flat, steps=not torch.accelerator.is_available())


def try_step(
    kind: str,
    made: type[torch.optim.Optimizer],
    params: Mapping[str, Any],
    shape: tuple[int, ...],
    *,
    where: str = "",
    steps: bool = True,
) -> None:
    """Build `made` for a weight of `shape` and let it make a step: types and values that do not fit show as its error.

    Args:
        kind, where: its name, and on what the step is made, for the sentence.
        steps: whether to make the step.

    Raises UserError.
    """
    import torch

    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.zeros(shape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = made([weight], **params)
            if steps:
                optimizer.step()
    except Exception as error:
        raise UserError(
            f"optimizer.params: a step of {kind} with {shown(dict(params))}{where} fails with "
            f"{type(error).__name__}: {one_line(error)}."
        ) from None
