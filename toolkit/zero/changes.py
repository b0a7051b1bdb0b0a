"""What changes in a model after its engine was made, and has no effect or another one than it seems."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import some
from toolkit.printable import warn_once
from toolkit.zero.gradients import HostCopy
from toolkit.zero.shards import model_weights, shards
from toolkit.zero.stage3 import ShardedZeroOptimizer3
from toolkit.zero.stage12 import ShardedZeroOptimizer

logger = logging.getLogger("toolkit")

SAMPLED = 64
"""Elements of each parameter that are looked at for what `param.data` wrote, which no version counts."""


def steps_copies(engine: Any) -> bool:
    """Whether the optimizer's tensors are others than the model's weights."""
    zero = engine.optimizer
    if isinstance(zero, ShardedZeroOptimizer | ShardedZeroOptimizer3):
        both = [(shard.tensor, model_weights(zero, shard)) for shard in shards(zero)]
        return any(own is None or own.data_ptr() != tensor.data_ptr() for tensor, own in both)
    return zero is not engine.basic_optimizer


def steps_alone(engine: Any) -> bool:
    """Whether weights change in the step only: not known of DeepSpeed's own optimizers, and of weights on NVMe."""
    zero = engine.optimizer
    ours = isinstance(zero, ShardedZeroOptimizer | ShardedZeroOptimizer3)
    return ours and not getattr(zero, "params_in_nvme_and_cpu", False)


class ChangeDetector:
    """Remembers what `model` trained when its engine was made, and warns, once each, of what changes.

    An engine shards and steps the parameters that it was made with.

    Args:
        zero: whether the engine is at a ZeRO stage from 1 on.
        copies: whether the optimizer steps copies of the weights (fp32 masters, weights on the host) and writes the
            model's from them.
        sampled: whether weights change in the step only, so that they themselves can be compared.
        both: ids of parameters of which copies and weights were written to alike (`access.py`) since the last step.
    """

    def __init__(self, model: nn.Module, *, zero: bool, copies: bool, sampled: bool, both: set[int]) -> None:
        self._both = both
        self._model, self._zero, self._copies, self._first = model, zero, copies, True
        self._sampled = sampled
        self._differs: list[tuple[tuple[torch.device, torch.dtype], HostCopy]] = []
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.accept()

    def accept(self) -> None:
        """Weights are the optimizer's own: after a step, or when both were loaded."""
        self._both.clear()
        self._versions = {name: param._version for name, param in self._trained.items()} if self._copies else {}
        self._weights = self._sample() if self._copies and self._sampled else {}

    def stepped(self) -> None:
        """To be called after each step, which is queued by now, so that no device stands still for the answer."""
        differs, self._differs = self._differs, []
        held, written = self._held() if differs else {}, []
        for kind, mask in differs:
            parts = mask.wait().split([part.numel() for _, part in held[kind]])
            written += [name for (name, _), part in zip(held[kind], parts, strict=True) if part.any()]
        self._say_written(written)
        self.accept()

    def _held(self) -> dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]]:
        """The first elements of what this rank holds of each parameter; those of one device and type are one tensor."""
        found: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for name, param in self._trained.items():
            part = getattr(param, "ds_tensor", param).detach().view(-1)[:SAMPLED]
            found.setdefault((part.device, part.dtype), []).append((name, part))
        return found

    def _sample(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {kind: torch.cat([part for _, part in parts]) for kind, parts in self._held().items()}

    def look(self) -> None:
        """To be called before each step."""
        thawed = [name for name, param in self._frozen.items() if param.requires_grad]
        if thawed:
            _warn(thawed, "unfrozen after the engine was made and will not be trained: set requires_grad before")
            self._frozen = {name: param for name, param in self._frozen.items() if not param.requires_grad}
        frozen = [name for name, param in self._trained.items() if not param.requires_grad]
        if frozen:
            effect = "still stepped, by momentum and weight decay" if self._zero else "left as they are"
            _warn(frozen, f"frozen after the engine was made and {effect}: set requires_grad before")
            self._trained = {name: param for name, param in self._trained.items() if param.requires_grad}
            self._versions = {name: version for name, version in self._versions.items() if name in self._trained}
        if self._first:
            self._first = False
            known = {id(param) for param in (*self._trained.values(), *self._frozen.values())}
            found = {name: param for name, param in self._model.named_parameters() if param.requires_grad}
            new = [name for name, param in found.items() if id(param) not in known and name not in thawed]
            if new:
                _warn(new, "added or replaced after the engine was made and will not be trained: make the engine last")
        written = [name for name, version in self._versions.items() if version != self._trained[name]._version]
        if not written and self._weights:
            now = self._sample()
            same = [kind for kind, old in self._weights.items() if kind in now and now[kind].shape == old.shape]
            masks = {kind: (now[kind] != self._weights[kind]) & ~self._weights[kind].isnan() for kind in same}
            self._differs = [(kind, HostCopy(mask)) for kind, mask in masks.items()]
        self._say_written(written)

    def _say_written(self, written: list[str]) -> None:
        written = [name for name in written if id(self._trained[name]) not in self._both]
        if written:
            self._copies = False
            _warn(
                written,
                "written to from outside, but the optimizer steps its own copy and replaces what was written: load "
                "weights before the engine is made, or a checkpoint through it, or call safe_set_full_fp32_param",
            )


def _warn(names: list[str], what: str) -> None:
    warn_once(logger, "%s: %s", some(names, 8), what)
