"""Named models, configurations read from a folder, and how many parameters they have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError, nearest
from toolkit.records.activations import Activations

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ALL, _CHECKPOINTED = Activations(), Activations(checkpoint=True)


@dataclass(frozen=True)
class Preset:
    """A model known by name.

    `config` holds the keyword arguments of the configuration of `family`, one of transformers' model types; `tokenizer`
    is the default for ``toolkit.data.load_tokenizer``; `activations` and `loss` ("chunked" or "plain") are the defaults
    of ``build_model``.
    """

    name: str
    purpose: str
    tokenizer: str
    config: Mapping[str, Any]
    activations: Activations
    loss: str
    family: str = "qwen3"


def _shape(
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    vocab: int = 151_936,
    head_dim: int = 128,
    tied: bool,
    context: int = 40_960,
    eps: float = 1e-6,
    theta: float = 1e6,
    **own: Any,
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    } | own


def _published(
    size: str, config: dict[str, Any], *, activations: Activations = _CHECKPOINTED, family: str = "qwen3"
) -> Preset:
    return Preset(
        f"qwen3-{size}",
        f"Qwen3-{size.upper()} with the published shape",
        # One vocabulary serves the whole family.
        "Qwen/Qwen3-0.6B",
        config,
        activations,
        "chunked",
        family,
    )


def _llama3(size: str, hidden: int, ffn: int, layers: int, heads: int) -> Preset:
    return Preset(
        f"llama3-{size}",
        f"Llama 3 {size.upper()} with the published shape",
        "meta-llama/Meta-Llama-3-8B",
        _shape(hidden, ffn, layers, heads, 8, vocab=128_256, tied=False, context=8192, eps=1e-5, theta=5e5),
        _CHECKPOINTED,
        "chunked",
        "llama",
    )


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "qwen3-3m",
            "3M parameters: small enough to compare many optimizers on two CPU cores",
            "python-4k",
            _shape(192, 512, 4, 3, 3, vocab=4096, head_dim=64, tied=False, context=4096),
            _ALL,
            "plain",
        ),
        Preset(
            "qwen3-tiny",
            "5M parameters: learns visibly within minutes on two CPU cores",
            "python-4k",
            _shape(256, 704, 4, 4, 2, vocab=4096, head_dim=64, tied=False, context=4096),
            _ALL,
            "plain",
        ),
        Preset(
            "qwen3-134m",
            "the 134M model that the AMCS and SOAM papers train",
            "mistral-32k",
            _shape(768, 2048, 12, 12, 12, vocab=32_000, head_dim=64, tied=False, context=4096),
            _ALL,
            "chunked",
        ),
        _published("0.6b", _shape(1024, 3072, 28, 16, 8, tied=True), activations=_ALL),
        _published("1.7b", _shape(2048, 6144, 28, 16, 8, tied=True)),
        _published("4b", _shape(2560, 9728, 36, 32, 8, tied=True)),
        _published("8b", _shape(4096, 12_288, 36, 32, 8, tied=False)),
        _published("14b", _shape(5120, 17_408, 40, 40, 8, tied=False)),
        _published("32b", _shape(5120, 25_600, 64, 64, 8, tied=False)),
        _published("30b-a3b", _shape(2048, 6144, 48, 32, 4, tied=False, **_EXPERTS), family="qwen3_moe"),
        _llama3("8b", 4096, 14_336, 32, 32),
        _llama3("70b", 8192, 28_672, 80, 64),
    )
}


_HUB_NAME = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]*\w")
"""owner/name."""


def load_config(name_or_folder: str) -> tuple[PretrainedConfig, Preset | None]:
    """The configuration of a preset, or of the causal language model whose ``config.json`` (or its folder) is given.

    Also a name of the hub (owner/name), if this machine's cache has it. Returns a fresh configuration object and the
    preset, or None for a folder. Nothing is downloaded and no code from the folder is run. Raises UserError for an
    unknown name, a missing folder, an unreadable ``config.json`` and a model that does not predict the next token.
    """
    preset = PRESETS.get(name_or_folder)
    if preset is not None:
        from transformers import AutoConfig

        return AutoConfig.for_model(preset.family, **preset.config), preset
    return _config_of_folder(folder_of(name_or_folder)), None


def check_name(name_or_folder: str) -> None:
    """Raise UserError if there is no such model; `load_config` says more, and takes seconds to import transformers."""
    if name_or_folder not in PRESETS:
        folder_of(name_or_folder)


def folder_of(name_or_folder: str) -> Path:
    """The folder of a model that is no preset: its own, or that of a name of the hub in this machine's cache.

    Nothing is downloaded. Raises UserError if there is none.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.name == "config.json" and folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model folder {str(folder)!r} holds no config.json.")
        return folder
    if folder.exists():
        raise UserError(f"model {name_or_folder!r} is a file: give its config.json, or the folder that holds it.")
    if _HUB_NAME.fullmatch(name_or_folder):
        return _cached(name_or_folder)
    if "/" in name_or_folder or "\\" in name_or_folder or name_or_folder.startswith((".", "~")):
        raise UserError(f"model folder {name_or_folder!r} does not exist.")
    raise UserError(
        f"unknown model {name_or_folder!r}: expected one of {', '.join(PRESETS)}, or a folder with a "
        f"config.json.{nearest(name_or_folder, PRESETS)}"
    )


def _cached(name: str) -> Path:
    """What a cache of the hub's files has as the newest of model `name` (`HF_HOME`, `HF_HUB_CACHE`)."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    if isinstance(found, str):
        return Path(found).parent
    raise UserError(
        f"model folder {name!r} does not exist, and the Hugging Face hub's cache ({constants.HF_HUB_CACHE}) has no "
        f"such model; `hf download {name}` puts it there.{nearest(name.partition('/')[2], PRESETS)}"
    )


def hub_name(folder: Path) -> tuple[str, str] | None:
    """(name on the hub, revision) of a model's `folder` in a cache of the hub's files; None: it lies elsewhere."""
    *_, model, snapshots, revision = ("", "", *folder.parts)
    kind, *name = model.split("--")
    return ("/".join(name), revision) if kind == "models" and name and snapshots == "snapshots" else None


def check_length(config: PretrainedConfig, name: str, seq_len: int) -> None:
    """Raise UserError if model `name` of `config` has no positions for `seq_len` predictions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise UserError(f"--seq-len is {seq_len}, but model {name!r} has {positions} positions.")


def _config_of_folder(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises a different type for each way a file can be wrong
        raise UserError(
            f"{str(folder / 'config.json')!r} is not a usable model configuration: {first_line(error)}"
        ) from error
    for key in ("_attn_implementation", "_experts_implementation"):
        kernel = getattr(config, key, None)
        if isinstance(kernel, str) and "/" in kernel:  # transformers would fetch it from the hub and import it
            raise UserError(
                f"{str(folder)!r} asks for the kernel {kernel!r} in its config.json, code that is never run here."
            )
    # Encoders such as BERT have a causal class too, but attend in both directions unless is_decoder is set.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or encoder or config.is_encoder_decoder:
        raise UserError(
            f"{str(folder)!r} holds a {config.model_type!r} model, which is not a causal language model: give "
            "one that transformers' AutoModelForCausalLM builds, such as qwen3, llama or gpt2."
        )
    return config


OWN_CODE = "it needs code that comes with it, which is never run here"


def first_line(error: Exception) -> str:
    """What `error` says, cut to one line, or to two where the first only announces the second; else its type."""
    if "trust_remote_code" in str(error):
        return OWN_CODE
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
