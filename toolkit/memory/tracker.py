"""Watches every operation and writes down the lifetime of each storage that it makes."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from pathlib import PurePath
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.memory.storages import HEAD, Lifetime, Scope, StorageTrace
from toolkit.models.build import blocks
from toolkit.records import categories as c

_FRAMES = 40
"""Looked through for the line that made a tensor."""


class Tracker(TorchDispatchMode):
    """Writes `storages` while it is active. On the meta device, too, where storages have a size and take no memory.

    Args:
        storages: is written to.
        sites: also write down the line of code, or the operation of the backward pass, that made each storage, and
            give those that DeepSpeed or `toolkit.zero` made the categories "gathered" and "buckets".

    What an operation allocates and frees within itself is no tensor, and not seen.
    """

    def __init__(self, storages: StorageTrace, *, sites: bool) -> None:
        super().__init__()
        self.storages = storages
        self._sites = sites
        self._stride = 1
        self._known: dict[int, Lifetime | None] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._scope: list[Scope] = []
        self._hooks: list[Any] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled: what they allocate within is not seen."""
        return True

    # ---- storages -------------------------------------------------------------------------------------------------

    def adopt(self, tensor: Tensor, category: str | None, what: str = "") -> None:
        """Count the storage of `tensor`, made before; with `category` None it is known, but not counted."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        lifetime = None
        if category is not None:
            lifetime = Lifetime(storage.nbytes(), -1, None, c.INIT, category, what, address=storage.data_ptr())
        self._follow(storage, lifetime)

    def lifetime(self, tensor: Tensor) -> Lifetime | None:
        """The lifetime of the storage of `tensor`, if it is counted."""
        return self._known.get(tensor.untyped_storage()._cdata)

    def _follow(self, storage: Any, lifetime: Lifetime | None) -> None:
        key = storage._cdata
        if lifetime is not None:
            self.storages.lifetimes.append(lifetime)

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self._references.pop(key, None)
            if lifetime is not None:
                lifetime.freed_at = self._tick()

        self._known[key] = lifetime
        self._references[key] = weakref.ref(storage, gone)

    def _tick(self) -> int:
        moment = self.storages.now
        self.storages.now += self._stride
        if self.storages.nanoseconds is not None:
            self.storages.nanoseconds.append(time.time_ns())
        return moment

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.run(func, args, kwargs or {})
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        for output in outputs:
            if isinstance(output, Tensor):
                self._seen(func, output, args, kwargs or {})
        return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do the operation."""
        return func(*args, **kwargs)

    def _seen(self, func: Any, output: Tensor, args: Any, kwargs: Any) -> None:
        storage = output.untyped_storage()
        if storage._cdata in self._known or storage.nbytes() == 0:
            return
        # A view of, or a change to, what was there before this tracker makes no storage.
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.untyped_storage()._cdata == storage._cdata for x in inputs):
            self._follow(storage, None)
            return
        lifetime = Lifetime(
            storage.nbytes(),
            self._tick(),
            None,
            self.storages.phase,
            what=str(func).removesuffix(".default"),
            scope=self._scope[-1] if self._scope else None,
        )
        if self._sites:
            lifetime.address = storage.data_ptr()
            lifetime.where, maker = _site(sys._getframe(1))
            # In the step, what ZeRO makes is no communication buffer.
            if maker == c.GATHERED or lifetime.phase in (c.BACKWARD, c.REDUCE):
                lifetime.category = maker
        self._follow(storage, lifetime)

    # ---- the model ------------------------------------------------------------------------------------------------

    def attach(
        self, model: nn.Module, head: nn.Module | None, on_gradient: Callable[[int, nn.Parameter], None]
    ) -> None:
        """Follow the calls of the blocks of `model`, and its gradients.

        Args:
            model: whose blocks are its layers, and all else that has parameters.
            head: the module that makes logits.
            on_gradient: called with the number of a parameter (in `model.parameters()`) and the parameter when its
                gradient is whole. The lifetime of the gradient has been marked by then.
        """
        for name, block in blocks(model):
            label = HEAD if block is head else name
            self._hooks.append(block.register_forward_pre_hook(self._open(label)))
            self._hooks.append(block.register_forward_hook(self._close, always_call=True))
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(self._gradient(number, name)))
                self._hooks.append(
                    parameter.register_post_accumulate_grad_hook(lambda p, number=number: on_gradient(number, p))
                )

    def detach(self) -> None:
        """Take all hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _open(self, label: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if label == HEAD and self.storages.phase == c.FORWARD:
                self._enter_head(inputs)
            scope = Scope(label, self.storages.now)
            self.storages.scopes.append(scope)
            self._scope.append(scope)

        return hook

    def _close(self, *_: Any) -> None:
        if self._scope:
            self._scope.pop().closed = self.storages.now

    def _enter_head(self, inputs: tuple[Any, ...]) -> None:
        number, began = len(self.storages.heads), self.storages.now
        self.storages.heads.append((began, sys.maxsize))

        def leave(_: Tensor) -> None:
            self.storages.heads[number] = (began, self.storages.now)

        # Not the gradient of its weight: a tied one is whole only when that of the embedding is.
        hidden = inputs[0] if inputs else None
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            self._hooks.append(hidden.register_hook(leave))

    def _gradient(self, number: int, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            lifetime = self.lifetime(gradient)
            # A view of something larger is not the gradient's own storage.
            if lifetime is not None and lifetime.bytes <= gradient.numel() * gradient.element_size() + 64:
                lifetime.category, lifetime.what, lifetime.parameter = c.GRADIENTS, f"gradient of {name}", number

        return hook


def _site(frame: FrameType | None) -> tuple[str, str | None]:
    """The line of code that a tensor was made for, and a category if that line is one of ZeRO's."""
    for _ in range(_FRAMES):
        if frame is None:
            break
        path = frame.f_code.co_filename
        if path.endswith("torch/autograd/graph.py"):
            node = torch._C._current_autograd_node()
            return f"backward: {node.name() if node is not None else 'autograd'}", None
        if "/torch/" not in path and path != __file__:
            where = f"{'/'.join(PurePath(path).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
            if "/deepspeed/runtime/zero/partition" in path:
                return where, c.GATHERED
            return where, c.BUCKETS if "/deepspeed/" in path or "/toolkit/zero/" in path else None
        frame = frame.f_back
    # On a GPU the backward pass has a thread of its own, with none of the caller's frames.
    node = torch._C._current_autograd_node()
    return (f"backward: {node.name()}" if node is not None else ""), None
