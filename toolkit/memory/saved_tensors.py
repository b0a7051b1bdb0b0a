"""The tensors that are saved for the backward pass when an allocation fails, without a trace of what made them.

The tensors in the frames that the exception went through lead to autograd's graph, whose nodes hold what they saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from toolkit.records import categories as c
from toolkit.records.by_category import Named

_PASSES = (c.FORWARD, c.BACKWARD, c.EVAL)
_MOST = 100_000
"""Nodes that are visited: a graph of any model here is smaller."""


def reachable_tensors(error: BaseException, phase: str, *, saved: bool, vocabulary: int | None) -> Iterator[Named]:
    """Tensors in the frames of `error`, and with `saved` those that their graphs have saved: category, name and tensor.

    Without `saved` nothing is unpacked: where activations are checkpointed, that would compute them again. A tensor
    whose last dimension is the vocabulary is taken for logits.
    """
    usual = c.ACTIVATIONS if phase in _PASSES else c.TRANSIENTS

    def category(tensor: Tensor) -> str:
        return c.LOGITS if phase in _PASSES and tensor.dim() > 1 and tensor.shape[-1] == vocabulary else usual

    roots: list[Any] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        for name, tensor in _tensors(trace.tb_frame.f_locals):
            if tensor.grad_fn is not None:
                roots.append(tensor.grad_fn)
            function = trace.tb_frame.f_code.co_name
            if not isinstance(tensor, torch.nn.Parameter):
                shape = list(tensor.shape)
                yield category(tensor), f"{name} {shape} {str(tensor.dtype)[6:]} in {function}", tensor
        trace = trace.tb_next
    if not saved:
        return
    seen: set[Any] = set()
    while roots and len(seen) < _MOST:
        node = roots.pop()
        if node in seen:
            continue
        seen.add(node)
        roots.extend(following for following, _ in node.next_functions if following is not None)
        for tensor in _saved(node):
            yield category(tensor), f"saved for {node.name()} {list(tensor.shape)} {str(tensor.dtype)[6:]}", tensor


def _tensors(values: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (tuple, list)) and len(value) < 100:
            yield from ((name, item) for item in value if isinstance(item, Tensor))


def _saved(node: Any) -> Iterator[Tensor]:
    for name in dir(node):
        # "saved_tensors": of functions written in Python.
        if not (name.startswith("_saved_") or name == "saved_tensors"):
            continue
        try:
            value = getattr(node, name)
        except Exception:  # freed by the backward pass already
            continue
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, Tensor) and not isinstance(item, torch.nn.Parameter):
                yield item
