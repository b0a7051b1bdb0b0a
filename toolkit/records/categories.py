"""The names that every byte goes by, and the phases of a run: one vocabulary for prediction and measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

WEIGHTS = "weights"
MASTER = "master weights"
REMAINDER = "remainder"
GRADIENTS = "gradients"
SCALES = "scales"
BUCKETS = "buckets"
GATHERED = "gathered"
ACTIVATIONS = "activations"
LOGITS = "logits"
TRANSIENTS = "transients"
WORKSPACES = "workspaces"
CONTEXT = "context"
OTHER = "other"

MEANING = {
    WEIGHTS: "this rank's part of the weights that the model computes with",
    MASTER: "the optimizer's fp32 copy of weights",
    REMAINDER: "the bits that bf16 weights lack",
    GRADIENTS: "gradients from autograd until the step has used them",
    SCALES: "scales of compressed state, one fp32 for every 256 codes",
    BUCKETS: "communication buffers",
    GATHERED: "weights of other ranks, gathered for a moment (ZeRO-3)",
    ACTIVATIONS: "what the forward pass keeps for the backward pass",
    LOGITS: "from the head's output to the loss, and their gradients",
    TRANSIENTS: "what an operation needs for a moment",
    WORKSPACES: "what cuBLAS keeps of torch's allocator for itself",
    CONTEXT: "the CUDA context and libraries, outside torch's allocator",
    OTHER: "allocated, but reachable through nothing that has a name here",
}
"""Every category but the states of the optimizer, which go by their own names (m_fast, v, exp_avg, ...)."""

_BEFORE_STATES = (WEIGHTS, MASTER, REMAINDER, GRADIENTS)

MODEL_STATE = frozenset({WEIGHTS, MASTER, REMAINDER, GRADIENTS, SCALES})
"""Categories that, with the optimizer's states, make up the model state; those not in MEANING are states."""

_Amount = TypeVar("_Amount")

INIT, FORWARD, BACKWARD, REDUCE, STEP, EVAL, CHECKPOINT = PHASES = (
    "init",
    "forward",
    "backward",
    "reduce",
    "step",
    "eval",
    "checkpoint",
)


def ordered(names: Iterable[str]) -> list[str]:
    """`names` in the order in which they are shown: what stays first, optimizer states in the middle."""
    order = list(MEANING)
    last = len(_BEFORE_STATES)

    def place(name: str) -> tuple[int, str]:
        if name in _BEFORE_STATES:
            return order.index(name), ""
        return (order.index(name) + 1, "") if name in MEANING else (last, name)

    return sorted(set(names), key=place)


def in_order(amounts: Mapping[str, _Amount]) -> dict[str, _Amount]:
    """`amounts` by category, in the order in which they are shown."""
    return {name: amounts[name] for name in ordered(amounts)}


def bytes_by_category(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Add up pairs of category and bytes."""
    found: Counter[str] = Counter()
    for category, size in sizes:
        found[category] += size
    return in_order(found)


def is_model_state(name: str) -> bool:
    """Whether bytes of this category belong to the model state: weights, gradients, optimizer state."""
    return name in MODEL_STATE or name not in MEANING


def model_state(sizes: Mapping[str, int]) -> int:
    """The bytes of `sizes`, by category, that belong to the model state."""
    return sum(size for name, size in sizes.items() if is_model_state(name))


def category_of_state(key: str) -> str:
    """The category of a tensor in the optimizer's state, from its key: `m`, `m.scale`, `remainder.low`."""
    name, _, part = key.partition(".")
    return SCALES if part == "scale" and name != REMAINDER else name
