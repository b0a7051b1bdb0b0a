"""A checkpoint as a Hugging Face folder: safetensors that `AutoModelForCausalLM.from_pretrained` loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint.source import Source
from toolkit.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 2 * 10**9
PREFIX = "hf."
"""The transformers model is this part of the module that was trained."""


def export(source: Source, folder: Path, *, dtype: str = "bf16", shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write weights, config.json and tokenizer into `folder`; returns the weight files.

    Args:
        dtype: "bf16", the weights that the model computed with, or "fp32", with what rounding to bf16 left over.
        shard_bytes: a file holds no more than that, unless a single parameter is larger. So much is in memory at a
            time: parameters are read from the ranks' files as they are written.

    Raises:
        UserError: the checkpoint does not say which model it is of; the folder holds a model already.
    """
    from safetensors.torch import save_file

    from toolkit import data, models
    from toolkit.models.build import skeleton

    identity = source.manifest.facts.get("identity")
    if identity is None:
        raise UserError(f"{source.folder} does not say which model it is of, and cannot be exported")
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a model already; give another folder")
    config, _ = models.load_config(identity["model"]["name"])
    model = skeleton(config, DTYPES[dtype])
    config.architectures = [type(model).__name__]
    config.dtype = DTYPES[dtype]
    folder.mkdir(parents=True, exist_ok=True)
    files = _plan(source, DTYPES[dtype].itemsize, shard_bytes)
    total, places = 0, {}
    for file, names in files.items():
        tensors = {name.removeprefix(PREFIX): value for name, value in _tensors(source, names, dtype)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        total += sum(value.nbytes for value in tensors.values())
        del tensors
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config.save_pretrained(folder)
    data.load_tokenizer(identity["tokenizer"]["name"]).save_pretrained(folder)
    return [folder / file for file in files]


def _plan(source: Source, itemsize: int, shard_bytes: int) -> dict[str, list[str]]:
    """File names, and the parameters of each."""
    sizes = {name: place.numel * itemsize for name, (_, place) in source.sharding.by_name.items()}
    sizes |= {name: value.numel() * itemsize for name, value in (source.frozen() | source.buffers()).items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sorted(sizes.items()):
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _tensors(source: Source, names: list[str], dtype: str) -> Iterator[tuple[str, Tensor]]:
    rest: dict[str, Any] = source.frozen() | source.buffers()
    for name in names:
        if name in rest:
            value = rest[name]
            yield name, value.to(DTYPES[dtype]) if value.is_floating_point() else value
            continue
        _, place = source.sharding.by_name[name]
        # The bf16 weight itself, where there is one: the sum of weight and remainder may round to its neighbour.
        flat = source.elements(name, None, 0, place.numel)
        whole = flat if flat.dtype == DTYPES[dtype] else source.weights(name, 0, place.numel).to(DTYPES[dtype])
        yield name, torch.empty_like(whole).copy_(whole).view(place.shape)
