"""Builds a model with the same bits at every world size and ZeRO stage, one copy of it in memory at most."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor, nn

from toolkit.errors import UserError, nearest
from toolkit.models.activations import keep_activations, keep_as_priced
from toolkit.models.lora import adapt
from toolkit.models.loss import CHUNKABLE, IGNORED, LOSSES, LossHead, plain_loss
from toolkit.models.masks import additive_masks
from toolkit.models.presets import Preset, first_line, folder_of, load_config
from toolkit.printable import warn_once
from toolkit.records.activations import Activations
from toolkit.records.lora import LoRA

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

Place = Callable[[nn.Module], Callable[[Tensor], Tensor]]
"""Of a model on the meta device: memory for each of its parameters, uninitialised, in its shape and dtype, on whatever
device it will be trained."""


class CausalLM(nn.Module):
    """A transformers model whose forward is its own next-token loss; `hf` is that model.

    Mixture-of-experts models get no auxiliary router loss.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, tokens: LongTensor) -> Tensor:
        """Mean loss of the predictions, 0-d fp32, of `tokens`, int64 [micro_batch, seq_len + 1], or of conversations.

        These are [micro_batch, 3, seq_len + 1]: tokens, labels (IGNORED where a token is not predicted), and places in
        a conversation, each of which attends to itself alone.
        """
        conversations = tokens.dim() == 3
        labels, places = (tokens[:, 1], {"position_ids": tokens[:, 2, :-1]}) if conversations else (tokens, {})
        inputs, targets = (tokens[:, 0] if conversations else tokens)[:, :-1], labels[:, 1:]
        head = self.hf.get_output_embeddings()
        with additive_masks() if conversations else nullcontext():
            if isinstance(head, LossHead):
                hidden = self.hf.base_model(input_ids=inputs, use_cache=False, **places).last_hidden_state
            else:
                logits = self.hf(input_ids=inputs, use_cache=False, **places).logits
        if isinstance(head, LossHead):
            return head(hidden, targets, conversations)
        return plain_loss(logits, targets, conversations)


def predictions(tokens: Tensor) -> Tensor:
    """How many predictions `CausalLM` makes of `tokens`, 0-d int64 where they are."""
    if tokens.dim() == 3:
        return (tokens[:, 1, 1:] != IGNORED).sum()
    return torch.tensor(tokens[:, 1:].numel())


def build_model(
    name_or_folder: str,
    *,
    dtype: torch.dtype,
    seed: int,
    zero3_config: dict[str, Any] | None = None,
    from_checkpoint: bool = False,
    vocab_size: int | None = None,
    activations: Activations | None = None,
    loss: str | None = None,
    lora: LoRA | None = None,
    place: Place | None = None,
) -> CausalLM:
    """Build the model of a preset or of a folder with a ``config.json``, in `dtype`, on the CPU unless `place` differs.

    Weights are random: drawn in fp32 by the architecture's own rule from `seed` and the name of each module
    alone, then rounded to `dtype`. With `from_checkpoint` they are the ones that the folder holds. With
    `zero3_config`, the DeepSpeed configuration, each parameter is partitioned over the ranks as soon as it is
    made: all ranks must call this together, and each keeps its own part only.

    `vocab_size` replaces the configuration's (random weights only). `activations` and `loss`
    ("chunked": full logits are never built; "plain") default to the preset's choice, and for a folder to all
    and "chunked". An architecture that "chunked" is not known to be right for gets a warning and "plain". With `lora`
    adapters alone are trained, drawn from `seed`. `place` says where random weights of a model without adapters go;
    it is called with the model on the meta device.

    Raises UserError for what `load_config` rejects, an unknown loss, weights that are missing or do not fit, and
    activations that the architecture cannot do without.
    """
    config, preset = load_config(name_or_folder)
    if loss is not None and loss not in LOSSES:
        raise UserError(f"unknown loss {loss!r}: expected {' or '.join(LOSSES)}.{nearest(loss, LOSSES)}")
    if vocab_size is not None and vocab_size < 1:
        raise UserError(f"the vocabulary size must be a positive number of tokens, not {vocab_size}.")
    if from_checkpoint:
        if preset:
            raise UserError(f"preset {name_or_folder!r} has no weights to load: give a model folder instead.")
        if vocab_size not in (None, config.vocab_size):
            raise UserError(
                f"the checkpoint in {name_or_folder!r} has a vocabulary of {config.vocab_size}, not "
                f"{vocab_size}: its size cannot be changed while loading."
            )
        hf = load_pretrained(folder_of(name_or_folder), dtype, zero3_config)
    else:
        config.vocab_size = vocab_size or config.vocab_size
        hf = skeleton(config, dtype)
        _initialise(hf, seed, zero3_config, place if lora is None else None)
    return complete(hf, preset, activations, loss, lora, seed)


def blueprint(
    name_or_folder: str,
    *,
    dtype: torch.dtype,
    activations: Activations | None = None,
    loss: str | None = None,
    attention: str | None = None,
    layers: int | None = None,
    lora: LoRA | None = None,
) -> CausalLM:
    """The model that `build_model` builds, on the meta device: it takes no memory.

    `attention` is transformers' `attn_implementation` ("sdpa", "eager", ...; default: its own choice), `layers` cuts
    the model to its first ones.

    Raises UserError as `build_model` does.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config, preset = load_config(name_or_folder)
    if layers is not None:
        config.num_hidden_layers = layers
    if attention is not None:
        config._attn_implementation = attention
    with torch.device("meta"), no_init_weights():
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    hf.tie_weights()
    model = complete(hf, preset, activations, loss, lora)
    keep_as_priced(hf)
    return model


def complete(
    hf: PreTrainedModel,
    preset: Preset | None,
    activations: Activations | None,
    loss: str | None,
    lora: LoRA | None = None,
    seed: int | None = None,
) -> CausalLM:
    """The model around `hf`, with a loss and what it keeps of its activations; None is the preset's choice.

    `lora`: with adapters, drawn from `seed`, or without memory.
    """
    if (loss or (preset.loss if preset else "chunked")) == "chunked":
        _use_chunked_loss(hf)
    kept = activations or (preset.activations if preset is not None else Activations())
    if lora is not None:
        if kept.tiled:
            raise UserError("--activations tiled computes with an MLP's own weights, past the adapters of --lora.")
        adapt(hf, lora, seed)
    keep_activations(hf, kept)
    return CausalLM(hf)


def skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of `config` with parameters on the meta device, which takes no memory, and real buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # Buffers such as rotary frequencies follow from the configuration, not from a draw. zero.Init would round
    # them to `dtype`, which is why models are not constructed under it here.
    with init_empty_weights(include_buffers=False), no_init_weights():
        hf = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    hf.tie_weights()  # each placeholder was registered anew, which parted the tied ones
    return hf


@torch.no_grad()
def _initialise(hf: PreTrainedModel, seed: int, zero3_config: dict[str, Any] | None, place: Place | None) -> None:
    """Give every parameter of a skeleton its first value, largest block first.

    The order keeps the peak at one copy of the model: the fp32 draw of a block lives beside what is already
    made, and for the largest blocks that is little.
    """
    room = place(CausalLM(hf)) if place is not None else partial(torch.empty_like, device="cpu")
    partition: AbstractContextManager[Any] = nullcontext()
    draws = True
    if zero3_config is not None:
        import deepspeed

        # Partitions the parameters of any module constructed under it; rank 0's values go to all ranks.
        partition = deepspeed.zero.Init(config_dict_or_path=zero3_config)
        draws = deepspeed.comm.get_rank() == 0
    made: dict[nn.Parameter, nn.Parameter] = {}  # by placeholder, so that tied parameters stay tied
    for name, block in sorted(blocks(hf), key=lambda item: -sum(p.numel() for p in item[1].parameters())):
        slots = [
            (module, key, placeholder)
            for module in block.modules()
            for key, placeholder in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        if draws:
            for module, key, placeholder in slots:
                if placeholder not in made:
                    draft = torch.empty_like(placeholder, dtype=torch.float32, device="cpu")
                    module.register_parameter(key, nn.Parameter(draft))
                    del draft  # or it would outlive its block
            _draw(hf, name, block, seed)
        for module, key, placeholder in slots:
            if placeholder not in made:
                value = room(placeholder)
                if draws:
                    value.copy_(module.get_parameter(key))
                made[placeholder] = nn.Parameter(value, placeholder.requires_grad)
                with partition:
                    nn.ParameterDict({"parameter": made[placeholder]})
            module.register_parameter(key, made[placeholder])


def blocks(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Disjoint parts that hold all parameters between them, with their names: each layer, embedding, norm, head."""
    if any(True for _ in module.parameters(recurse=False)):
        yield name, module
        return
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(module, nn.ModuleList):
            yield path, child
        else:
            yield from blocks(child, path)


def _draw(hf: PreTrainedModel, name: str, block: nn.Module, seed: int) -> None:
    """Let the architecture initialise the fp32 parameters of `block`, from `seed` and the modules' names.

    Children come before parents, as in transformers: some architectures rescale a child from its parent.
    """
    generator = torch.random.default_generator
    state = generator.get_state()
    for path, module in reversed(list(block.named_modules(prefix=name))):
        digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        hf._init_weights(module)
    generator.set_state(state)


def load_pretrained(
    folder: Path, dtype: torch.dtype, zero3_config: dict[str, Any] | None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The model in `folder` with its weights; partitioned while loading if `zero3_config` is given.

    `config`: what it is a model of, if not of the config.json there.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # transformers partitions as long as such an object is alive, and only then.
    zero3 = HfDeepSpeedConfig(copy.deepcopy(zero3_config)) if zero3_config is not None else None
    given = {"config": config, "dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **given)
    except Exception as error:  # transformers and safetensors raise a different type for each kind of damage
        raise UserError(f"the weights in {str(folder)!r} cannot be loaded: {first_line(error)}") from error
    finally:
        del zero3
    hf, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"the weights in {str(folder)!r} do not fit its config.json: {len(missing)} of the parameters are "
            f"missing or have another shape, {missing[0]!r} for one."
        )
    return hf


def _use_chunked_loss(hf: PreTrainedModel) -> None:
    """Make the head of `hf` a LossHead where that gives the model's own loss; say so where it does not."""
    head = hf.get_output_embeddings()
    if hf.config.model_type in CHUNKABLE and type(head) is nn.Linear:
        LossHead.adopt(head)
    else:
        kind = hf.config.model_type
        warn_once(logger, "loss: plain, with full logits: %r is not known to use its head's output as it is", kind)


def count_parameters(config: PretrainedConfig) -> int:
    """How many parameters the model of `config` has; tied matrices count once.

    Pure arithmetic for Qwen3. Any other architecture is laid out on the meta device and counted, which
    allocates nothing.
    """
    if config.model_type != "qwen3":
        return sum(parameter.numel() for parameter in skeleton(config).parameters())
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = hidden * config.head_dim * (2 * heads + 2 * kv_heads) + 2 * config.head_dim
    if config.attention_bias:
        attention += config.head_dim * (heads + 2 * kv_heads) + hidden
    ffn = 3 * hidden * config.intermediate_size
    layer = attention + ffn + 2 * hidden
    vocabulary_matrices = 1 if config.tie_word_embeddings else 2
    return vocabulary_matrices * config.vocab_size * hidden + config.num_hidden_layers * layer + hidden
