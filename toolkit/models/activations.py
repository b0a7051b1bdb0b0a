"""What a transformers model keeps of its activations: set as `toolkit.records.activations` says, and read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from toolkit.errors import UserError
from toolkit.models.offload import HostActivations
from toolkit.models.tiled import TiledMLP
from toolkit.printable import warn_once
from toolkit.records.activations import BUDGET, CHECKPOINT, FLAG, TILED, Activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Architectures whose blocks have, as `mlp`, down_proj(act_fn(gate_proj(x)) * up_proj(x)), or a mixture of experts.
TILEABLE = frozenset({"gemma", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})


def keep_activations(hf: PreTrainedModel, wanted: Activations) -> None:
    """Let `hf` keep what is `wanted`; once for each model.

    Raises UserError for what its architecture does not have.
    """
    if wanted.tiled:
        _tile(hf)
    if wanted.checkpoint:
        _checkpoint(hf, wanted)
    if wanted.budget is not None:
        if not (blocks := checkpointable(hf)):
            raise UserError(
                f"{hf.config.model_type!r} models have no blocks that can be told apart: leave {BUDGET} out of {FLAG}."
            )
        for block in blocks:
            block.activation_budget = wanted.budget  # type: ignore[assignment]


def keep_as_priced(hf: PreTrainedModel) -> None:
    """Have a model that no compiler will see, and that has a budget for its activations, hold about as much."""
    kept = kept_activations(hf)
    if kept.budget is not None and (priced := kept.priced(len(checkpointable(hf)))).checkpoint:
        _checkpoint(hf, priced)


def kept_activations(model: nn.Module) -> Activations:
    """What `model`, of this package or the user's own, keeps of its activations."""
    blocks = checkpointable(model)
    budgets = {getattr(block, "activation_budget", None) for block in blocks}
    if len(budgets) == 1 and (budget := budgets.pop()) is not None:
        return Activations(budget=budget)
    flags = [_checkpoints(block) for block in blocks]
    others = any(_checkpoints(module) for module in model.modules())
    checkpoint = any(flags) if flags else others
    first = flags.index(False) if False in flags else None
    return Activations(
        checkpoint=checkpoint,
        # Any others than the first ones are not of this package's making; "checkpoint" says most of it.
        blocks=first if checkpoint and first and not any(flags[first:]) else None,
        offload=checkpoint and host_activations(model) is not None,
        tiled=any(isinstance(module, TiledMLP) for module in model.modules()),
    )


def host_activations(model: nn.Module) -> HostActivations | None:
    """Where the blocks of `model` keep their inputs, if that is the host."""
    for module in model.modules():
        found = getattr(getattr(module, "_gradient_checkpointing_func", None), "host", None)
        if isinstance(found, HostActivations):
            return found
    return None


def _checkpoints(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))


def checkpointable(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that can be computed again one by one, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _checkpoint(hf: PreTrainedModel, wanted: Activations) -> None:
    kind, blocks = hf.config.model_type, checkpointable(hf)
    if not hf.supports_gradient_checkpointing:
        raise UserError(f"{kind!r} models do not support activation checkpointing: leave {CHECKPOINT} out of {FLAG}.")
    if (wanted.blocks is not None or wanted.offload) and not blocks:
        raise UserError(f"{kind!r} models have no blocks that can be told apart: write {FLAG} {CHECKPOINT}.")
    if wanted.blocks is not None and wanted.blocks > len(blocks):
        raise UserError(f"{FLAG} is {str(wanted)!r}, but the model has {len(blocks)} blocks.")
    # The first name is that of transformers 5.23 and later, where the second warns.
    enable = getattr(hf, "activation_checkpointing_enable", None) or hf.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    host = HostActivations()
    for number, block in enumerate(blocks):
        part: Any = block
        part.gradient_checkpointing = wanted.blocks is None or number < wanted.blocks
        if wanted.offload:
            part._gradient_checkpointing_func = host.wrap(part._gradient_checkpointing_func)


def _tile(hf: PreTrainedModel) -> None:
    kind = hf.config.model_type
    if kind not in TILEABLE:
        known = ", ".join(sorted(TILEABLE))
        raise UserError(
            f"the MLPs of {kind!r} models are not known to run in tiles, only those of {known}: leave {TILED} "
            f"out of {FLAG}."
        )
    mlps = [mlp for block in checkpointable(hf) if isinstance(mlp := getattr(block, "mlp", None), nn.Module)]
    for mlp in mlps:
        if TiledMLP.fits(mlp):
            TiledMLP.adopt(mlp)
    left = sum(not isinstance(mlp, TiledMLP) for mlp in mlps)
    if left:
        share = "all" if left == len(mlps) else "some"
        warn_once(logger, "%s: %s blocks are mixtures of experts, which are left as they are", TILED, share)
