"""The optimizers whose step is measured: rules of this package in any format, and those of other packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.bench.shapes import Shapes
from toolkit.errors import UserError, nearest
from toolkit.optim import RULES, find_rule
from toolkit.state.layout import DEFAULT_FORMAT, state_formats
from toolkit.state.remainders import MASTER, WEIGHTS

FP32, BF16, MASTERED = "fp32", "bf16", "master"
"""How weights are held: fp32 with fp32 gradients; bf16 with bf16 gradients; bf16 with bf16 gradients and an fp32 copy,
which is updated and then copied into them. (Rules of this package have bf16+16, bf16+8 and bf16+4, too, and
round to bf16 stochastically.)"""

DEFAULT = (
    "torch-adamw:fp32",
    "torch-adamw:bf16",
    "deepspeed-cpu-adam:fp32",
    "deepspeed-cpu-adam:bf16",
    "bnb-adamw8bit:fp32",
    "bnb-ademamix8bit:fp32",
    "flash-adamw:bf16",
    "amcs:8bit:fp32",
    "amcs:8bit:bf16+8",
    "soam:8bit:bf16+8",
    "adamw8:8bit:fp32",
    "adamw8:8bit:bf16+8",
)

Params = list[nn.Parameter]


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package.

    Attributes:
        package: its import name; the project it belongs to is `project`.
        weights: how it can hold them, its default first.
        device: the only one it runs on, if there is one.
        state: bytes of state a parameter, where they cannot be counted in `optimizer.state`.
    """

    package: str
    project: str
    make: Callable[[Params], torch.optim.Optimizer]
    weights: tuple[str, ...] = (FP32, BF16, MASTERED)
    device: str | None = None
    state: float | None = None


def _torch(params: Params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def _deepspeed(params: Params) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, lr=1e-3)


def _adamw8bit(params: Params) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=1e-3)


def _ademamix8bit(params: Params) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdEMAMix8bit(params, lr=1e-3)


def _flash(params: Params) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(params, lr=1e-3, master_weight_bits=24)


PEERS: dict[str, Peer] = {
    "torch-adamw": Peer("torch", "torch", _torch),
    "deepspeed-cpu-adam": Peer("deepspeed", "deepspeed", _deepspeed, device="cpu"),
    "bnb-adamw8bit": Peer("bitsandbytes", "bitsandbytes", _adamw8bit),
    "bnb-ademamix8bit": Peer("bitsandbytes", "bitsandbytes", _ademamix8bit),
    # Two states of 8 bits with fp16 scales of 32 elements each, and 8 bits of the weight.
    "flash-adamw": Peer("flashoptim", "flashoptim", _flash, weights=(BF16,), device="cuda", state=3.125),
}


@dataclass(frozen=True)
class Contender:
    """One optimizer with the way in which it holds state and weights. `state_format` is None for a peer."""

    optimizer: str
    state_format: str | None
    weights: str

    @property
    def name(self) -> str:
        return ":".join(part for part in (self.optimizer, self.state_format, self.weights) if part is not None)

    @property
    def ours(self) -> bool:
        return self.state_format is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that a model computes with, and of their gradients."""
        return torch.float32 if self.weights == FP32 else torch.bfloat16

    def missing(self, device: str) -> str | None:
        """Why it cannot run on `device` here, or None."""
        peer = None if self.ours else PEERS[self.optimizer]
        if peer is None:
            return None
        if importlib.util.find_spec(peer.package) is None:
            return f"the package {peer.project} is not installed"
        if peer.device not in (None, device):
            return f"it runs on {'a GPU' if peer.device == 'cuda' else 'a CPU'} only"
        return None

    def optimizer_of(self, parameters: Params, shapes: Shapes) -> torch.optim.Optimizer:
        """The optimizer itself, of the tensors that it updates."""
        if not self.ours:
            return PEERS[self.optimizer].make(parameters)
        kind = find_rule(self.optimizer)
        assert kind is not None
        options: dict[str, Any] = {"total_steps": 1000} if "total_steps" in kind.rule.model_fields else {}
        weights = MASTER if self.weights in (FP32, MASTERED) else self.weights
        return kind(shapes.param_groups(parameters), state_format=self.state_format, weights=weights, **options)


def read_contenders(names: Sequence[str]) -> list[Contender]:
    """The optimizers that the entries of `--optimizers` name, each once.

    Raises:
        UserError: the first entry that is not right.
    """
    found = [_contender(name) for name in names]
    if not found:
        raise UserError(f"--optimizers names none; known are {', '.join(_known())}.")
    return list(dict.fromkeys(found))


def _known() -> list[str]:
    return [*PEERS, *(name.lower() for name in RULES)]


def _contender(text: str) -> Contender:
    where = f"--optimizers {text}"
    name, *parts = text.split(":")
    peer = PEERS.get(name.lower())
    rule = find_rule(name) if peer is None else None
    if peer is None and rule is None:
        raise UserError(
            f"{where}: there is no optimizer {name!r}; known are {', '.join(_known())}.{nearest(name, _known())}"
        )
    form = "NAME:WEIGHTS" if peer else "NAME:STATE_FORMAT:WEIGHTS"
    if len(parts) > (1 if peer else 2):
        raise UserError(f"{where}: this is not of the form {form}.")
    if peer is not None:
        return Contender(name.lower(), None, _weights(parts[0] if parts else peer.weights[0], peer.weights, where))
    assert rule is not None
    state_format = parts[0] if parts else DEFAULT_FORMAT
    state_formats(rule.rule.states, state_format, where=where)
    weights = _weights(parts[1] if len(parts) > 1 else FP32, (FP32, MASTERED, *WEIGHTS), where)
    return Contender(rule.__name__.lower(), state_format, weights)


def _weights(given: str, allowed: Sequence[str], where: str) -> str:
    if given not in allowed:
        raise UserError(f"{where}: weights are {given!r}, but must be {', '.join(allowed)}.{nearest(given, allowed)}")
    return given


class Stepper:
    """One step of a contender: gradients are there, and afterwards the weights that a model computes with are new.

    Args:
        contender: what steps.
        shapes: of the tensors.
        weights: those that a model computes with, of `contender.dtype`; contenders may share them, since how long a
            step takes does not depend on their values.
        gradients: of the same type.
    """

    def __init__(self, contender: Contender, shapes: Shapes, weights: list[Tensor], gradients: list[Tensor]) -> None:
        self._contender, self._weights, self._gradients = contender, weights, gradients
        mastered = contender.weights == MASTERED
        self._held = [nn.Parameter(weight.float() if mastered else weight) for weight in weights]
        self._casts = mastered and not contender.ours  # others want gradients of the type of the weights
        for held, gradient in zip(self._held, gradients, strict=True):
            held.grad_dtype = None  # of any type
            held.grad = None if self._casts else gradient
        self.optimizer = contender.optimizer_of(self._held, shapes)
        self._parameters = shapes.parameters

    def __call__(self) -> None:
        if self._casts:
            for held, gradient in zip(self._held, self._gradients, strict=True):
                held.grad = gradient.float()
        self.optimizer.step()
        if self._contender.weights == MASTERED:
            with torch.no_grad():
                for weight, held in zip(self._weights, self._held, strict=True):
                    weight.copy_(held)

    def state_bytes(self) -> float:
        """Bytes a parameter that the optimizer holds after its first step, an fp32 copy of the weights included."""
        master = 4.0 if self._contender.weights == MASTERED else 0.0
        known = None if self._contender.ours else PEERS[self._contender.optimizer].state
        if known is not None:
            return known + master
        held = {id(one): one for state in self.optimizer.state.values() for one in state.values()}
        tensors = [one for one in held.values() if isinstance(one, Tensor)]  # bitsandbytes shares its tables
        return sum(one.nbytes for one in tensors) / self._parameters + master

    def bytes_moved(self) -> float:
        """Bytes a parameter that a step must move: state read and written, weights too, the gradient read.

        The weights beside an fp32 copy of them are written only.
        """
        width = self._contender.dtype.itemsize
        passes = 2 if self._contender.weights == MASTERED else 3
        return passes * width + 2 * self.state_bytes()
