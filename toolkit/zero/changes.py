"""What changes in a model after its engine was made, and has no effect or another one than it seems."""

from __future__ import annotations

import logging

from torch import nn

from toolkit.errors import some
from toolkit.printable import warn_once

logger = logging.getLogger("toolkit")


class ChangeDetector:
    """Remembers what `model` trained when its engine was made, and warns, once each, of what changes.

    An engine shards and steps the parameters that it was made with.

    Args:
        zero: whether the engine is at a ZeRO stage from 1 on.
        copies: whether the optimizer steps copies of the weights (fp32 masters, weights on the host) and writes the
            model's from them.
    """

    def __init__(self, model: nn.Module, *, zero: bool, copies: bool) -> None:
        self._model, self._zero, self._copies, self._first = model, zero, copies, True
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.accept()

    def accept(self) -> None:
        """Weights are the optimizer's own: after a step, or when both were loaded."""
        self._versions = {name: param._version for name, param in self._trained.items()} if self._copies else {}

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
        if written:
            self._copies = False
            _warn(
                written,
                "written to from outside, but the optimizer steps its own copy and replaces what was written: load "
                "weights before the engine is made, or a checkpoint through it",
            )


def _warn(names: list[str], what: str) -> None:
    warn_once(logger, "%s: %s", some(names, 8), what)
