"""Which component of a transformer each parameter belongs to, read from the module tree."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from toolkit.errors import UserError, some
from toolkit.optim.rule import COMPONENTS
from toolkit.printable import warn_once
from toolkit.state.layout import check_dtype
from toolkit.state.sharding import whole_shape

logger = logging.getLogger("toolkit")

# Names of modules on the path to a parameter, in Qwen, Llama, Mistral, Gemma, GPT-2, GPT-NeoX and their
# mixture-of-experts variants. The innermost module that one of them matches decides.
_PATTERNS = (
    ("norm", re.compile(r"(^|_)(norm|layernorm|rmsnorm)|norm$|^ln(_|\d|$)")),
    ("attention", re.compile(r"attn|attention")),
    ("ffn", re.compile(r"^(mlp|ffn|feed_forward|moe|block_sparse_moe|experts?|shared_experts?)(_|\d|$)")),
    ("head", re.compile(r"^(lm_head|embed_out|output_projection)$")),
    ("embedding", re.compile(r"^(embed_tokens|embed_in|embed_positions|wte|wpe|word_embeddings|tok_embeddings)$")),
)


def component_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The component of the parameter called `name` ("model.layers.0.mlp.up_proj.weight"), "other" if none fits.

    `modules` is `dict(model.named_modules())`. The innermost module that tells decides: a norm inside
    attention is a norm. Types count as well as names, so that unusual names of ordinary layers still fit.
    """
    path = name.split(".")[:-1]
    for depth in range(len(path), 0, -1):
        module = modules.get(".".join(path[:depth]))
        kind = type(module).__name__
        if isinstance(module, nn.LayerNorm) or kind.lower().endswith(("norm", "rmsnorm")):
            return "norm"
        for component, pattern in _PATTERNS:
            if pattern.search(path[depth - 1].lower()):
                return component
        if isinstance(module, nn.Embedding):
            return "embedding"
        if isinstance(module, nn.MultiheadAttention) or kind.endswith("Attention"):
            return "attention"
        if kind.endswith(("MLP", "FeedForward", "Experts")):
            return "ffn"
    return "other"


def param_groups(model: nn.Module, params: Iterable[Any] | None = None, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups of `model` for an optimizer of this package: one per component and treatment.

    Norms, biases and other 1-D parameters come in groups of their own with no weight decay and fp32 state.
    Tied weights count once, where they are named first.

    Args:
        model: the module tree that names components.
        params: the trainable parameters, or groups of them whose options (lr, weight_decay, component, ...)
            take precedence, over the missing weight decay of norms and biases too; default: all of `model`
            that require gradients.
        **options: options set in every group.

    Raises:
        UserError: a parameter is given twice, does not belong to `model`, or is trainable but left out.
    """
    # A compiled module comes after its wrapper, and it is the module that tells.
    modules = {plain_name(name): module for name, module in model.named_modules()}
    names = {id(p): plain_name(name) for name, p in model.named_parameters() if p.requires_grad}
    given = _normalize(names, model, params)
    _check_once(names, given)
    groups: dict[tuple[int, str, bool], dict[str, Any]] = {}
    unplaced = []
    for index, (tensors, own) in enumerate(given):
        chosen = (options | own).get("component")
        for tensor in tensors:
            name = names[id(tensor)]
            check_dtype(tensor.dtype, f"parameter {name!r}")
            component = chosen or component_of(name, modules)
            if not whole_shape(tensor).numel():  # nothing to train, and ZeRO cannot cut a group of such ones
                continue
            if component == "other" and not chosen:
                unplaced.append(name)
            delicate = _is_delicate(name, component, tensor)
            key = (index, component, delicate)
            if key not in groups:
                group: dict[str, Any] = {"params": [], "component": component} | options
                if delicate:
                    groups[key] = group | {"weight_decay": 0.0} | own | {"state_format": "fp32", "matrix": False}
                else:
                    groups[key] = group | own
            groups[key]["params"].append(tensor)
    if unplaced:
        known = ", ".join(component for component in COMPONENTS if component != "other")
        warn_once(
            logger,
            'parameters that are in no known component (%s) train as "other", at the rate as given ("component" of a '
            "parameter group says otherwise): %s",
            known,
            some(unplaced, 8),
        )
    return list(groups.values())


def plain_name(name: str) -> str:
    """`name` without the parts that `torch.compile(module)` puts in."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _is_delicate(name: str, component: str, tensor: Tensor) -> bool:
    """Norms, biases and whatever is 1-D, by role and not by shape alone: a bias of packed experts is 2-D."""
    return component == "norm" or name.endswith("bias") or len(whole_shape(tensor)) <= 1


_Given = list[tuple[list[Tensor], dict[str, Any]]]


def _normalize(names: Mapping[int, str], model: nn.Module, params: Iterable[Any] | None) -> _Given:
    if params is None:
        return [([p for p in model.parameters() if id(p) in names], {})]
    loose: list[Tensor] = []
    given: _Given = []
    for item in params:
        if isinstance(item, Mapping):
            own = {key: value for key, value in item.items() if key not in ("params", "param_names")}
            tensors = item["params"]
            given.append(([tensors] if isinstance(tensors, Tensor) else _untuple(tensors), own))
        else:
            loose += _untuple([item])
    if loose:
        given.insert(0, (loose, {}))
    return [([p for p in tensors if p.requires_grad], own) for tensors, own in given]


def _untuple(tensors: Iterable[Any]) -> list[Tensor]:
    return [item[1] if isinstance(item, tuple) else item for item in tensors]


def _check_once(names: Mapping[int, str], given: _Given) -> None:
    seen: set[int] = set()
    for tensors, _ in given:
        for tensor in tensors:
            if id(tensor) not in names:
                raise UserError(
                    f"a parameter of shape {list(tensor.shape)} given to the optimizer does not belong to the "
                    "model; pass the parameters of the model that is trained"
                )
            if id(tensor) in seen:
                raise UserError(
                    f"parameter {names[id(tensor)]!r} is given to the optimizer twice; every parameter belongs "
                    "to exactly one group"
                )
            seen.add(id(tensor))
    left = [name for key, name in names.items() if key not in seen]
    if left:
        raise UserError(
            f"{len(left)} trainable parameters are not given to the optimizer, the first is {left[0]!r}; pass "
            "them too or set requires_grad=False on them"
        )
