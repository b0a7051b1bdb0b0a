"""What torch's files of a checkpoint may hold: looked at when a file is opened, before anything relies on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from toolkit.checkpoint.files import squeezed_as
from toolkit.checkpoint.schema import LARGEST, RANKS_LIMIT, Count
from toolkit.errors import UserError
from toolkit.sentences import explain
from toolkit.state.layout import dtype_name
from toolkit.state.sharding import Flat, Sharding, blocks_of

PER_RANK = "leanstate"
"""Key of what this package adds to each rank's optimizer file: the states of random number generators, and `OWN`."""
OWN = "module"
"""Key there of buffers and extra state as they are on that rank; rank 0's are with the module."""
SCHEDULE = "leanstate_schedule"
"""Key of what it adds to the file with the module: the name of the schedule's class."""
BASE = "leanstate_base"
"""Key beside it of the shapes, by name, of parameters that are in the `base.Base` and in no file of the checkpoint."""
Shape = Annotated[tuple[Count, ...], Field(max_length=64)]
Ranks = Annotated[int, Field(ge=1, le=RANKS_LIMIT)]


class _Content(BaseModel):
    """DeepSpeed's versions differ in what else they save."""

    model_config = ConfigDict(extra="allow", strict=True, arbitrary_types_allowed=True)


class _Module(_Content):
    module: dict[str, Any]
    buffer_names: list[str]
    shared_params: dict[str, str] | None = None
    param_shapes: list[dict[str, Shape]] | None = None
    frozen_param_shapes: dict[str, Shape] | None = None
    frozen_param_fragments: dict[str, Tensor] | None = None
    leanstate_base: dict[str, Shape] | None = None
    lr_scheduler: dict[str, Any] | None = None
    global_steps: Count
    global_samples: Count | None = None
    skipped_steps: Count


class _Group(_Content):
    params: list[Count]


class _Base(_Content):
    state: dict[Count, dict[str, Any]]
    param_groups: list[_Group]


class _Zero(_Content):
    zero_stage: Annotated[int, Field(ge=1, le=3)]
    partition_count: Ranks | Annotated[list[Ranks], Field(min_length=1)]
    param_alignment_paddings: list[list[Count]] | None = None


class _Stages12(_Zero):
    base_optimizer_state: _Base
    single_partition_of_fp32_groups: list[Tensor]


class _Stage3(_Zero):
    optimizer_state_dict: _Base
    fp32_flat_groups: list[Tensor]


def check_model(content: Any, path: Path) -> dict[str, Any]:
    """`content` of the file with the module, whose keys and types are as they should be. Raises UserError."""
    _check(content, _Module, path)
    for name in content["buffer_names"]:
        if not isinstance(content["module"].get(name), Tensor):
            raise UserError(f"{path} is damaged (the buffer {name!r} is missing)")
    found: dict[str, Any] = content
    return found


def check_optimizer(content: Any, path: Path) -> dict[str, Any]:
    """The same of a rank's optimizer file."""
    body = content.get("optimizer_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(body, Mapping):
        raise UserError(f"{path} is damaged (it holds no optimizer_state_dict)")
    stage = body.get("zero_stage")
    _check(body, _Stage3 if isinstance(stage, int) and stage == 3 else _Stages12, path)
    if not isinstance(content.get(PER_RANK, {}), Mapping | None):
        raise UserError(f"{path} is damaged ({PER_RANK!r} is no mapping)")
    return dict(content)


def check_groups(content: Any, path: Path) -> dict[str, Any]:
    """The same of the optimizer's file in a universal layout."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is damaged (it holds no param_groups)")
    for group in content.get("param_groups", [None]):
        _check(group, _Group, path)
    return dict(content)


def _check(content: Any, model: type[BaseModel], path: Path) -> None:
    try:
        model.model_validate(content)
    except (ValidationError, RecursionError) as error:
        why = explain(error, model) if isinstance(error, ValidationError) else "it is nested too deeply"
        raise UserError(f"{path} is damaged ({why})") from None


def check_rank(content: Mapping[str, Any], sharding: Sharding, rank: int, path: Path) -> None:
    """Raise UserError unless the tensors of a rank's optimizer file are those of `sharding`: dtypes and shapes."""
    body = content["optimizer_state_dict"]
    three = sharding.stage == 3
    if (int(body["zero_stage"]) == 3) != three:
        raise UserError(f"{path} is damaged (it is of ZeRO stage {int(body['zero_stage'])})")
    flats = body["fp32_flat_groups" if three else "single_partition_of_fp32_groups"]
    states = body["optimizer_state_dict" if three else "base_optimizer_state"]["state"]
    if len(flats) != len(sharding.flats):
        raise UserError(f"{path} is damaged (it has {len(flats)} flat tensors instead of {len(sharding.flats)})")
    for index, flat in enumerate(sharding.flats):
        problem = _flat_problem(flats[index], flat, _needed(sharding, flat, rank))
        held = states.get(index)
        if problem is None and held:
            problem = _state_problem(held, sharding, index, rank, flats[index].numel())
        elif problem is None and any(states.values()) and flat.size:
            problem = "its state is missing"
        if problem is not None:
            raise UserError(f"{path} is damaged (flat tensor {index}: {problem})")


def _needed(sharding: Sharding, flat: Flat, rank: int) -> int:
    """Elements of a rank's flat tensor without padding at its end, which DeepSpeed leaves out."""
    if sharding.stage == 3:
        return max((place.offset + place.share for place in flat.places), default=0)
    end = max((place.offset + place.numel for place in flat.places), default=0)
    return min(max(end - rank * flat.size, 0), flat.size)


def _flat_problem(tensor: Tensor, flat: Flat, needed: int) -> str | None:
    if tensor.dtype != flat.torch_dtype:
        return f"it is {dtype_name(tensor.dtype)} instead of {flat.dtype}"
    if tensor.dim() != 1 or not needed <= tensor.numel() <= flat.size:
        return f"it has {list(tensor.shape)} elements instead of {flat.size}"
    return None


def _state_problem(held: Mapping[str, Any], sharding: Sharding, index: int, rank: int, numel: int) -> str | None:
    if not is_step(held.get("step", 0)):
        return "its step is no number of steps"
    kept = dict(sharding.layout(index).specs)
    small = {name: sum(sizes) for name, sizes in sharding.small(index).items()} if rank == 0 else {}
    for name, size in small.items():
        value = held.get(name)
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or list(value.shape) != [size]:
            return f"its state {name!r} is not float32 [{size}]"
    more = sorted(held.keys() - kept.keys() - small.keys() - {"step"}) if sharding.rule is not None else []
    if more:
        return f"it has a state {more[0]!r}, which its manifest does not have"
    for key, spec in kept.items():
        value = held.get(key)
        if sharding.rule is None:  # optimizers of torch and DeepSpeed have flat state
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < numel:
                return f"its state {key!r} is not {numel} numbers"
            continue
        shape = [blocks_of(sharding.flats[index].size), spec.per_block]
        there = value if not isinstance(value, Mapping) else squeezed_as(value)
        good = isinstance(there, Tensor) and there.dtype == spec.dtype and list(there.shape) == shape
        if not good:
            return f"its state {key!r} is not {dtype_name(spec.dtype)} {shape}"
    return None


def is_step(value: Any) -> bool:
    """Whether `value` counts steps: a whole number, or a tensor of one, as torch's optimizers have it."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return math.isfinite(number) and 0 <= number <= LARGEST and number == int(number)


def check_whole(content: Any, shape: tuple[int, ...], path: Path) -> Tensor:
    """The tensor in a parameter's file of a universal layout. Raises UserError unless it has `shape`'s elements."""
    found = content.get("param") if isinstance(content, Mapping) else None
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.numel() != math.prod(shape):
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"{path} is damaged (it holds {what} instead of {list(shape)} numbers)")
    return found.to(torch.float32).reshape(-1)
