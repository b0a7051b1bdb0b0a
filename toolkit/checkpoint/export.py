"""A checkpoint as a Hugging Face folder: safetensors that `AutoModelForCausalLM.from_pretrained` loads."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.base import PREFIX
from toolkit.checkpoint.files import new_file_mode, synced
from toolkit.checkpoint.model_files import CONFIG, GENERATION, config_hash, model_files, tokenizer_hash
from toolkit.checkpoint.source import Source
from toolkit.errors import UserError
from toolkit.models.lora import ADAPTER, ADAPTER_CONFIG, adapt, adapted, merged, peft_config
from toolkit.records.lora import LoRA
from toolkit.sentences import value_at
from toolkit.state.layout import dtype_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = (
    dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16)
    | dict.fromkeys(("fp16", "float16", "half", "f16"), torch.float16)
    | dict.fromkeys(("fp32", "float32", "float", "f32"), torch.float32)
)
"""By what people call them."""
SHARD_BYTES = 2 * 10**9
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_DRAFT = ".exporting-"
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def export(
    source: Source, folder: Path, *, dtype: str | None = None, merge: bool = False, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write weights, config.json, tokenizer and generation settings into `folder`; returns the weight files.

    Of a run with adapters (LoRA) these alone are written, as peft loads them, with the tokenizer; with `merge` the
    whole model, in whose weights they are.

    What describes the model are the files that the run kept in its checkpoint. `folder` has no config.json, without
    which nothing loads it, until all else is in place.

    Args:
        dtype: a key of `DTYPES`, for all parameters of floating point; "fp32" are the weights with what rounding to
            bf16 left over. None: each parameter as the model computed with it. Buffers keep their dtype always.
        merge: as above.
        shard_bytes: a file holds no more than that, unless a single parameter is larger. So much is in memory at a
            time: parameters are read from the ranks' files as they are written.

    Raises:
        UserError: the checkpoint is damaged, does not say which model it is of, or is of another; the folder holds a
            model already; `dtype` cannot hold a weight.
    """
    _check_free(folder)
    _check_whole(source)
    config, files = _description(source)
    tensors = _Tensors(source, None if dtype is None else DTYPES[dtype])
    model = tensors.check(config)
    lora = adapters(source)
    if merge and lora is None:
        raise UserError(f"{source.folder} is of a run without adapters (--lora): leave --merge out")
    if merge:
        tensors.merge(model)
    config.architectures = [tensors.architecture]
    config.dtype = tensors.usual
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_DRAFT}*"):  # of an export that was killed
            shutil.rmtree(left)
        draft = folder / f"{_DRAFT}{secrets.token_hex(4)}"
        draft.mkdir()
        try:
            if lora is not None and not merge:
                weights = tensors.write_adapters(draft, lora)
                files = {name: content for name, content in files.items() if name != GENERATION}
            else:
                weights = tensors.write(draft, shard_bytes)
                config.save_pretrained(draft)
            for name, content in files.items():
                (draft / name).write_bytes(content)
            for path in sorted(draft.iterdir(), key=lambda path: path.name in (CONFIG, ADAPTER_CONFIG)):
                synced(path)
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    return [folder / name for name in weights]


def load_model(source: Source) -> PreTrainedModel:
    """The trained model, on the CPU; parameters as it computed with them, the only copy of them in memory.

    Raises:
        UserError: as `export`, of the checkpoint.
    """
    _check_whole(source)
    config, _ = _description(source)
    tensors = _Tensors(source, None)
    model = tensors.check(config)
    model.load_state_dict(tensors.read(list(tensors.shapes)), strict=False, assign=True)
    model.tie_weights()
    return model


def moved(source: Source, folder: Path | None) -> None:
    """Let the base of a checkpoint be in `folder`; None: where it was. Raises UserError where it has none."""
    if folder is None:
        return
    if not source.based or source.base is None:
        raise UserError(f"--model {folder}: {source.folder} holds all its weights; leave it out.")
    source.base = replace(source.base, path=str(folder.expanduser().resolve()))


def adapters(source: Source) -> LoRA | None:
    """Those that the run trained, if it did."""
    said = value_at(source.manifest.facts, "identity.model.lora")
    try:
        return None if said is None else LoRA.read(said)
    except ValueError as error:
        raise UserError(f"{source.folder}: what it says of adapters, {said!r}, {error}") from None


def _check_whole(source: Source) -> None:
    damage = manifests.damage(source.folder, source.manifest)
    if damage is not None:
        raise UserError(f"{source.folder} is damaged: {damage}")


def _check_free(folder: Path) -> None:
    for pattern in (CONFIG, ADAPTER_CONFIG, *_WEIGHTS):
        there = next(folder.glob(pattern), None) if folder.is_dir() else None
        if there is not None:
            raise UserError(f"{folder} holds a model already ({there.name}); give another folder.")


# ---- what describes the model ---------------------------------------------------------------------------------------


def _description(source: Source) -> tuple[PretrainedConfig, dict[str, bytes]]:
    """The configuration, and the files beside it, config.json left out."""
    from toolkit import models

    kept = source.model_files()
    if CONFIG in kept:
        config, _ = models.load_config(str(source.folder))
        files = {name: path.read_bytes() for name, path in kept.items()}
    else:
        config, files = _by_name(source)
    return config, {name: content for name, content in files.items() if name != CONFIG}


def _by_name(source: Source) -> tuple[PretrainedConfig, dict[str, bytes]]:
    """For checkpoints without such files: what their names stand for today, if it is what it was."""
    from toolkit import data, models

    identity = source.manifest.facts.get("identity")
    if identity is None:
        raise UserError(f"{source.folder} does not say which model it is of")
    model, tokenizer = identity["model"], identity["tokenizer"]
    config, _ = models.load_config(model["name"])
    loaded = data.load_tokenizer(tokenizer["name"])
    for part, kind, now in ((model, "model", config_hash(config)), (tokenizer, "tokenizer", tokenizer_hash(loaded))):
        if part["sha256"] != now:
            raise UserError(
                f"{source.folder} was trained with {kind} {part['name']!r}, which is another one now, and keeps no "
                "copy of its files; export where that name stands for what was trained"
            )
    return config, model_files(config, loaded, Path(model["name"]).expanduser())


# ---- weights --------------------------------------------------------------------------------------------------------


class _Tensors:
    """The tensors of an export, each in the dtype that it will have."""

    def __init__(self, source: Source, dtype: torch.dtype | None) -> None:
        self.source = source
        self.buffers = source.buffers()
        own: dict[str, Tensor] = {
            name: torch.empty(place.shape, dtype=source.dtype_of(name), device="meta")
            for name, (_, place) in source.sharding.by_name.items()
        }
        parameters = own | source.frozen
        if dtype is not None:
            parameters = {name: p.to(dtype) if p.is_floating_point() else p for name, p in parameters.items()}
        self.shapes = parameters | self.buffers
        """By name: shape and dtype."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in parameters.values():
            sizes[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
        self.usual = sizes.most_common(1)[0][0]
        self.architecture = ""
        self._kept = self.shapes
        self._merged: dict[str, tuple[str, Any]] = {}
        """Names under which weights are kept, and peft's modules, by the names that they have without these."""

    def check(self, config: PretrainedConfig) -> PreTrainedModel:
        """The model of `config`, without weights. Raises UserError unless these are all its tensors, and no others."""
        from toolkit.models.build import skeleton

        model = skeleton(config, self.usual)
        self.architecture = type(model).__name__
        if (lora := adapters(self.source)) is not None:
            adapt(model, lora, None)
        there = {name.removeprefix(PREFIX) for name in self.shapes}
        tied = {name.removeprefix(PREFIX) for name in self.source.tied()}
        here = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
        where = f"{self.source.folder} is no checkpoint of a {self.architecture} as its {CONFIG} has it"
        if lacking := here.keys() - there - tied:
            raise UserError(f"{where}: it lacks {len(lacking)} of the weights, {min(lacking)!r} for one")
        if more := there - here.keys():
            raise UserError(f"{where}: {len(more)} of its weights have no place there, {min(more)!r} for one")
        for name, tensor in self.shapes.items():
            found = here[name.removeprefix(PREFIX)].shape
            if tensor.shape != found:
                raise UserError(f"{where}: {name!r} is {list(tensor.shape)}, not {list(found)}")
        return model

    def merge(self, model: PreTrainedModel) -> None:
        """Let weights be those of `model`, which has adapters, without them."""
        self._merged = {f"{PREFIX}{name}.weight": (f"{PREFIX}{name}", layer) for name, layer in adapted(model)}
        self.shapes = {
            name.replace(".base_layer.", "."): tensor for name, tensor in self.shapes.items() if ".lora_" not in name
        }

    def write_adapters(self, folder: Path, lora: LoRA) -> list[str]:
        """Write the adapters as peft does; returns the name of the file."""
        from safetensors.torch import save_file

        names = [name for name in self.shapes if ".lora_" in name]
        tensors = {
            f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value for name, value in self.read(names).items()
        }
        noted = self.source.base
        base = noted.path if noted is not None else value_at(self.source.manifest.facts, "identity.model.name")
        peft_config(lora, base).save_pretrained(folder)
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        new_file_mode(folder / ADAPTER_WEIGHTS)
        return [ADAPTER_WEIGHTS]

    def write(self, folder: Path, shard_bytes: int) -> list[str]:
        """Write all into `folder`; returns the names of the files."""
        from safetensors.torch import save_file

        files = self._plan(shard_bytes)
        total, places = 0, {}
        for file, names in files.items():
            tensors = self.read(names)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            new_file_mode(folder / file)  # safetensors lets nobody else read its files
            places.update(dict.fromkeys(tensors, file))
            total += sum(value.nbytes for value in tensors.values())
            del tensors
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return list(files)

    def _plan(self, shard_bytes: int) -> dict[str, list[str]]:
        """File names, and the tensors of each."""
        shards: list[list[str]] = [[]]
        filled = 0
        for name, tensor in sorted(self.shapes.items()):
            if filled and filled + tensor.nbytes > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += tensor.nbytes
        if len(shards) == 1:
            return {"model.safetensors": shards[0]}
        return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors by the names that transformers' model has for them."""
        return {name.removeprefix(PREFIX): value for name, value in self._read(names)}

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            value, dtype = self._value(name), self.shapes[name].dtype
            # What is mapped from a file is copied, lest it change with that; a base is in memory already.
            loaded = name in self.source.based and value.dtype == dtype
            made = value if loaded else torch.empty(value.shape, dtype=dtype).copy_(value)
            if dtype.itemsize < value.dtype.itemsize and not torch.equal(made.isfinite(), value.isfinite()):
                raise UserError(f"{name!r} has values that {dtype_name(dtype)} cannot hold; give another --dtype")
            yield name, made.view(self.shapes[name].shape)

    def _value(self, name: str) -> Tensor:
        """A tensor as it is kept, which may be wider than asked for."""
        if name in self._merged:
            module, layer = self._merged[name]
            weight, a, b = (
                self._value(full).view(self._kept[full].shape)
                for full in (f"{module}.base_layer.weight", *(f"{module}.lora_{x}.{ADAPTER}.weight" for x in "AB"))
            )
            return merged(weight, a, b, layer)
        if name in self.buffers:
            return self.buffers[name]
        if name in self.source.frozen:
            return self.source.frozen_weight(name)
        _, place = self.source.sharding.by_name[name]
        # The bf16 weight itself, where there is one: the sum of weight and remainder may round to its neighbour.
        flat, dtype = self.source.elements(name, None, 0, place.numel), self._kept[name].dtype
        if flat.dtype == dtype:
            return flat
        whole = self.source.weights(name, 0, place.numel)
        # The universal layout has nothing but the sum, and says how it is to be taken apart.
        written = self.source.manifest.sharding
        found = written.by_name.get(name)
        kept = None if found is None else written.layout(found[0]).remainder
        return kept.split(whole)[0] if kept is not None and dtype == torch.bfloat16 else whole
