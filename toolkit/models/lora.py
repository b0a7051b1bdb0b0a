"""Adapters (LoRA, of the package peft) in a transformers model whose own weights stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.models.presets import first_line, hub_name
from toolkit.records.lora import ALL, FLAG, LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
"""peft's name of a model's only adapter, which is part of its parameters' names and not of those in its files."""
ADAPTER_CONFIG = "adapter_config.json"


def refuse_adapters(folder: Path) -> None:
    """Raise UserError where adapters lie beside the weights in `folder`: transformers would put them into the model.

    To train that model means to train nothing, and with --lora its adapters would make room for others.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder} holds adapters beside its weights ({ADAPTER_CONFIG}), which transformers loads into the model; "
            "merge them into the weights (peft's merge_and_unload), or take the file out of that folder."
        )


def peft_config(lora: LoRA, base: str | None = None) -> Any:
    """As peft writes it into adapter_config.json, for the model whose name or folder is `base`.

    A folder in a cache of the hub's files is told by its name there, as on another machine.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import peft
    except ImportError:
        raise UserError(
            f"{FLAG} needs the package peft, which is not installed: pip install 'leanstate[peft]'."
        ) from None
    name, revision = base, None
    if base is not None and Path(base).expanduser().is_dir():
        folder = Path(base).expanduser()
        name, revision = hub_name(folder) or (str(folder.resolve()), None)
    alpha: Any = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=alpha,
        target_modules=ALL if lora.targets == (ALL,) else list(lora.targets),
        lora_dropout=lora.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
        revision=revision,
    )


@torch.no_grad()
def adapt(hf: PreTrainedModel, lora: LoRA, seed: int | None) -> None:
    """Put adapters into `hf` and freeze all else.

    A is drawn from `seed` and the name of each module alone, B is zero; with no seed both take no memory.

    Raises:
        UserError: the package is not installed, or no module has such a name.
    """
    config = peft_config(lora)
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(config, hf, adapter_name=ADAPTER, low_cpu_mem_usage=seed is None)
    except ValueError as error:
        raise UserError(f"{FLAG} {lora}: {first_line(error).rstrip('.')}.") from error
    for name, layer in adapted(hf):
        if ADAPTER not in layer.lora_A or layer.lora_A[ADAPTER].weight.dim() != 2:
            raise UserError(f"{FLAG} {lora}: {name!r} is no linear module; name others as targets, or {ALL}.")
        for part in (layer.lora_A, layer.lora_B):  # which peft leaves in fp32 where they take no memory
            part.to(layer.get_base_layer().weight.dtype)
    if seed is None:
        return
    generator = torch.random.default_generator
    state = generator.get_state()
    for name, layer in adapted(hf):
        digest = hashlib.sha256(f"{seed}:{name}:lora".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        layer.reset_lora_parameters(ADAPTER, True)
    generator.set_state(state)


def adapted(hf: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of `hf` that have adapters, with their names."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in hf.named_modules() if isinstance(module, LoraLayer))


def merged(weight: Tensor, a: Tensor, b: Tensor, layer: Any) -> Tensor:
    """What the module `layer` of peft's computes with, fp32 of the shape of `weight`, its own."""
    product = layer.scaling[ADAPTER] * (b.float() @ a.float())
    return weight.float() + (product.T if layer.fan_in_fan_out else product)
