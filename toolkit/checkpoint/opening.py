"""Reading torch's files without running what they say: plain content, and the few objects that DeepSpeed saves."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.paths import regular


class Fields(dict[str, Any]):
    """The fields of an object of DeepSpeed's, by name: its class is not looked up, none of its code runs."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise TypeError("an object's fields must have names")
        self.update(state)


class _Stage(int):
    """A ZeRO stage: DeepSpeed saves a member of an enumeration."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _member(owner: Any, name: Any) -> int:
    """A stage by its name: Python 3.11.0 to 3.11.3 writes a member of an enumeration as `getattr` of its class."""
    if owner is not _Stage or name not in _STAGES:
        raise pickle.UnpicklingError("GLOBAL getattr of something else")
    return _STAGES[name]


# Each global that DeepSpeed's files mention, and what stands in for it. Nothing here may call what it is given.
_DEEPSPEED: list[Any] = [
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_member, "builtins.getattr"),
    *(
        (Fields, name)
        for name in (
            "deepspeed.runtime.fp16.loss_scaler.LossScaler",
            "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
            "deepspeed.utils.tensor_fragment.fragment_address",
            "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
        )
    ),
]
TRUST = "--trust-pickle"
_DEEPEST, _MOST = 64, 2_000_000


def load_file(folder: Path, name: str, *, trust: bool = False, hint: bool = True) -> Any:
    """What torch saved in the file `name` of `folder`, tensors mapped into memory.

    Args:
        trust: objects of any class are made, which runs whatever code the file names.
        hint: whether the error says how to do so.

    Raises:
        UserError: it is no regular file in `folder`, cannot be read, holds objects of unknown classes, or a tensor
            that claims more elements than the file has.
    """
    path = regular(folder, name)
    try:
        _check_stored(path)
        with torch.serialization.safe_globals(_DEEPSPEED):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=not trust)
        _check_tensors(content)
    except Exception as error:  # whatever a hostile file can make of the reader
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise UserError(f"{path} cannot be read ({_first_line(error)})") from None
        how = f"; {TRUST} reads it all the same, for files whose origin you trust" if hint else ""
        raise UserError(
            f"{path} holds more than plain data: it names {refused[1]}, and to read that can run any code{how}"
        ) from None
    return content


def _check_stored(path: Path) -> None:
    """torch stores its records as they are; one that is compressed could grow to any size."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its records are compressed")


def _check_tensors(content: Any) -> None:
    """Raise ValueError unless `content` is a tree of moderate size, its tensors as large as their memory."""
    waiting, count = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        # A pickle can hold itself, and a part of itself any number of times.
        if depth > _DEEPEST or count > _MOST:
            raise ValueError("it is nested too deeply or holds too much")
        if isinstance(value, Tensor):
            # A stride of zero would show one element as any number of them.
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError("a tensor in it is not a dense one")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor in it claims more elements than there are")
        elif isinstance(value, Mapping):
            waiting += [(part, depth + 1) for item in value.items() for part in item]
        elif isinstance(value, list | tuple | set):
            waiting += [(part, depth + 1) for part in value]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
