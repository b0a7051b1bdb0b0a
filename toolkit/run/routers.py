"""How evenly the routers of a mixture of experts share out the tokens of a step, over its micro-batches and ranks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_CHOICES = ("top_k_index", "router_indices")
"""What `forward` of the experts calls the experts of each token: of all that transformers dispatches alike
(`use_experts_implementation`), however their router chooses."""


class Routers:
    """Counts the tokens of each expert, on the device; nothing of it is there in a model without experts.

    Counted is what the model's forward pass in training hands to its experts: not validation, and not what activation
    checkpointing computes again in the backward pass.
    """

    def __init__(self, engine: Any) -> None:
        import torch

        self._forward = False
        self._layers: dict[str, Tensor] = {}
        """Of each layer, its part of `_counts`, and a place more for what is no expert of this process."""
        found = [(name, module) for name, module in engine.module.named_modules() if _choice(module)]
        sizes = [int(module.num_experts) + 1 for _, module in found]
        self._counts = torch.zeros(sum(sizes), dtype=torch.int64, device=engine.device)
        for (name, module), counts in zip(found, self._counts.split(sizes) if sizes else (), strict=True):
            layer = ".".join(part for part in name.split(".") if part.isdigit()) or name
            self._layers[layer if layer not in self._layers else name] = counts
            module.register_forward_pre_hook(self._counter(counts, _choice(module)), with_kwargs=True)
        if found:
            engine.module.register_forward_pre_hook(self._before)
            engine.module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, *_: Any) -> None:
        self._forward = module.training

    def _after(self, *_: Any) -> None:
        self._forward = False

    def _counter(self, counts: Tensor, name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._forward:
                chosen = (kwargs[name] if name in kwargs else args[1]).detach().reshape(-1)
                # Not bincount, for which the host waits to know how long its result is.
                counts.scatter_add_(0, chosen, counts.new_ones(()).expand(chosen.shape))

        return count

    def forget(self) -> None:
        """What has been counted since the last step is of none."""
        self._counts.zero_()

    def step(self) -> Callable[[], dict[str, Any]]:
        """To be called by every rank after each step; what is returned gives its part of the step's record, once the
        step has ended."""
        if not self._layers:
            return dict
        from torch import distributed

        from toolkit.zero.gradients import HostCopy

        everyones = self._counts.clone()
        self.forget()
        distributed.all_reduce(everyones)
        copy = HostCopy(everyones)
        sizes = [counts.numel() for counts in self._layers.values()]

        def read() -> dict[str, Any]:
            of_layers = [counts[:-1] for counts in copy.wait().split(sizes)]
            return summed_up(dict(zip(self._layers, of_layers, strict=True)))

        return read


def _choice(module: nn.Module) -> str:
    """The argument that names the experts of each token, second after the tokens; "" if these are no experts."""
    if not isinstance(getattr(module, "num_experts", None), int):
        return ""
    second = list(inspect.signature(module.forward).parameters)[1:2]
    return second[0] if second and second[0] in _CHOICES else ""


def summed_up(layers: dict[str, Tensor]) -> dict[str, Any]:
    """What a record of metrics.jsonl says of each expert's tokens, by layer.

    Loads are tokens over the mean of the layer's experts: 1 is an even share. `evenness` is the entropy of the shares
    over its maximum, log(experts).
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("layers", "busiest", "idlest", "evenness", "unused")}
    for layer, counts in layers.items():
        total, experts = float(counts.sum()), counts.numel()
        if not total:
            continue
        share = counts.double() / total
        entropy = -float((share * share.clamp(min=1e-30).log()).sum())
        columns["layers"].append(layer)
        columns["busiest"].append(_short(float(share.max()) * experts))
        columns["idlest"].append(_short(float(share.min()) * experts))
        columns["evenness"].append(_short(entropy / math.log(experts)) if experts > 1 else 1.0)
        columns["unused"].append(int((counts == 0).sum()))
    if not columns["layers"]:
        return {}
    return {"expert_load": max(columns["busiest"]), "experts_unused": sum(columns["unused"]), "routers": columns}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
