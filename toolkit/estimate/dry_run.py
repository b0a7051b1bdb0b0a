"""A training step on the meta device: every tensor has a size, none takes memory, and no number is computed.

The model's own code runs, forward and backward, and that of the loss, so any architecture is covered. What depends on
the device is chosen as it would be there: the kernel of attention, how the chunked loss multiplies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.config.automatic import Shape
from toolkit.estimate.meta_kernels import attention_of
from toolkit.memory.storages import Lifetime, StorageTrace, changes
from toolkit.memory.tracker import Tracker
from toolkit.models import cpu_matmul
from toolkit.models.activations import host_activations, kept_activations
from toolkit.models.build import CausalLM, blueprint
from toolkit.models.loss import LossHead
from toolkit.models.tiled import TiledMLP
from toolkit.records import categories as c
from toolkit.records.activations import Activations
from toolkit.records.lora import LoRA

MOMENTS = 4
"""From one allocation or release to the next: between them is room for what ZeRO does at that point."""


@dataclass(frozen=True)
class Parameter:
    """One parameter."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(order=True)
class Call:
    """One call of a module: from, until, and the numbers of its own parameters, if it has any."""

    opened: int
    closed: int | None
    parameters: tuple[int, ...]


@dataclass
class DryRun:
    """What one micro-batch of one rank makes and frees, without anything that ZeRO or the optimizer holds.

    `storages` has the phases forward and backward; gradients are freed as soon as they are whole, at the moments of
    `arrivals` (number of the parameter, moment). `calls` are in order.
    """

    model: CausalLM
    storages: StorageTrace
    parameters: list[Parameter]
    arrivals: list[tuple[int, int]]
    calls: list[Call]
    per_block: dict[str, int]
    loss: str
    activations: Activations
    offloaded: int
    """Bytes of activations on the host, at most."""
    attention: str
    widens: bool
    """Matrix products are computed in fp32, from tiles of bf16 operands (`toolkit.models.cpu_matmul`)."""

    @functools.cached_property
    def shape(self) -> Shape:
        return Shape.of(self.model)

    @functools.cached_property
    def gradients(self) -> list[Lifetime]:
        """Of whole parameters, which live on differently under ZeRO."""
        return [lifetime for lifetime in self.storages.lifetimes if lifetime.parameter is not None]

    @functools.cached_property
    def others(self) -> dict[str, np.ndarray]:
        """`toolkit.memory.storages.changes` of all else."""
        return changes((x for x in self.storages.lifetimes if x.parameter is None), self.storages.now)


def dry_run(
    model: str,
    *,
    dtype: torch.dtype,
    micro_batch: int,
    seq_len: int,
    device: str,
    activations: Activations | None = None,
    loss: str | None = None,
    attention: str | None = None,
    layers: int | None = None,
    lora: LoRA | None = None,
    conversations: bool = False,
) -> DryRun:
    """Run a forward and a backward pass on the meta device.

    Args:
        model: a preset or a folder, as for `toolkit.models.build_model`.
        dtype: that the model computes in.
        micro_batch, seq_len: sequences of a forward pass, and predictions per sequence.
        device: "cuda" or "cpu", whose kernels are assumed.
        activations, loss: None is the model's default.
        attention: "sdpa", "eager" or another of transformers' names; None is the model's default.
        layers: only so many of the model's.
        lora: adapters, which alone are trained.
        conversations: of which a sequence has several, so that attention has a mask.

    Raises:
        UserError: as `build_model`, and for activations that the device cannot keep so.
    """
    built = blueprint(
        model,
        dtype=dtype,
        activations=activations,
        loss=loss,
        attention=attention,
        layers=layers,
        lora=lora,
    )
    return pass_of(built, micro_batch=micro_batch, seq_len=seq_len, device=device, conversations=conversations)


def pass_of(built: CausalLM, *, micro_batch: int, seq_len: int, device: str, conversations: bool = False) -> DryRun:
    """`dry_run` of a model that is built, by `blueprint`; it is not to be run again."""
    built.train()
    kept = kept_activations(built)
    kept.check_device(device)
    storages = StorageTrace()
    tracker = _MetaTracker(storages, device, conversations)
    for tensor in [*built.parameters(), *built.buffers()]:
        tracker.adopt(tensor, None)
    arrivals: list[tuple[int, int]] = []

    def arrived(number: int, parameter: nn.Parameter) -> None:
        arrivals.append((number, storages.now))
        parameter.grad = None

    head = built.hf.get_output_embeddings()
    for module in built.modules():
        if isinstance(module, LossHead | TiledMLP):
            module.stands_for = device
    calls: list[Call] = []
    numbers = {id(p): number for number, p in enumerate(built.parameters())}
    hooks = _watch_calls(built, storages, numbers, calls)
    tracker.attach(built, head, arrived)
    kinds = (3,) if conversations else ()
    tokens = torch.zeros(micro_batch, *kinds, seq_len + 1, dtype=torch.int64, device="meta")
    tracker.adopt(tokens, None)
    with tracker, attention_of(device):
        storages.begin(c.FORWARD)
        value = built(tokens)
        storages.begin(c.BACKWARD)
        value.backward()
        del value
    tracker.detach()
    for hook in hooks:
        hook.remove()
    storages.classify()
    return DryRun(
        model=built,
        storages=storages,
        parameters=[Parameter(name, tuple(p.shape)) for name, p in built.named_parameters()],
        arrivals=arrivals,
        calls=calls,
        per_block=_per_block(built, storages),
        loss="chunked" if isinstance(head, LossHead) else "plain",
        activations=kept,
        offloaded=host.most if (host := host_activations(built)) is not None else 0,
        attention=str(built.hf.config._attn_implementation),
        widens=tracker.widens,
    )


def transients(function: Callable[[Tensor], Tensor], shape: tuple[int, ...], device: str) -> int:
    """Bytes that `function` makes of an fp32 tensor of `shape`, at its largest moment, the result among them."""
    storages = StorageTrace()
    tracker = _MetaTracker(storages, device)
    given = torch.empty(shape, dtype=torch.float32, device="meta")
    tracker.adopt(given, None)
    storages.begin(c.STEP)
    with torch.no_grad(), tracker:
        result = function(given)
    del result
    storages.classify()
    return int(storages.curve().total.max(initial=0))


def scaled(two: DryRun, three: DryRun, micro_batch: int) -> DryRun | None:
    """The dry run of `micro_batch` sequences, from those of two and three; None if they differ in more than size.

    Every tensor's size is linear in the number of sequences, as long as the same operations run. (With one sequence
    some copies are left out.) Not so the tiles of `cpu_matmul`.
    """
    if two.widens:
        return None

    def pattern(run: DryRun) -> list[tuple[int, int | None, str]]:
        return [(x.allocated_at, x.freed_at, x.what) for x in run.storages.lifetimes]

    if pattern(two) != pattern(three):
        return None
    lifetimes = [
        replace(small, bytes=small.bytes + (large.bytes - small.bytes) * (micro_batch - 2))
        for small, large in zip(two.storages.lifetimes, three.storages.lifetimes, strict=True)
    ]
    return replace(two, storages=replace(two.storages, lifetimes=lifetimes))


def _watch_calls(model: nn.Module, storages: StorageTrace, numbers: dict[int, int], calls: list[Call]) -> list[Any]:
    hooks = []
    for module in model.modules():
        # A tiled MLP's submodules are never called: it uses their weights.
        own = tuple(numbers[id(p)] for p in module.parameters(recurse=isinstance(module, TiledMLP)))
        running: list[Call] = []

        def opens(*_: Any, own: tuple[int, ...] = own, running: list[Call] = running) -> None:
            running.append(Call(storages.now, None, own))
            calls.append(running[-1])

        def closes(*_: Any, running: list[Call] = running) -> None:
            running.pop().closed = storages.now

        hooks.append(module.register_forward_pre_hook(opens))
        hooks.append(module.register_forward_hook(closes, always_call=True))
    return hooks


def _per_block(model: CausalLM, storages: StorageTrace) -> dict[str, int]:
    """Of the first transformer layer, in its forward call: what it keeps, and the most that it holds meanwhile."""
    layers = [scope for scope in storages.scopes if scope.name.rsplit(".", 1)[-1] == "0"]
    if not layers or layers[0].closed is None:
        return {}
    opened, closed = layers[0].opened, layers[0].closed
    mine = [x for x in storages.lifetimes if opened <= x.allocated_at < closed]
    changes: dict[int, int] = {}
    for lifetime in mine:
        changes[lifetime.allocated_at] = changes.get(lifetime.allocated_at, 0) + lifetime.bytes
        if lifetime.freed_at is not None and lifetime.freed_at < closed:
            changes[lifetime.freed_at] = changes.get(lifetime.freed_at, 0) - lifetime.bytes
    level = largest = 0
    for moment in sorted(changes):
        level += changes[moment]
        largest = max(largest, level)
    return {"kept": level, "largest moment": largest}


class _MetaTracker(Tracker):
    """Tracks operations on the meta device as `device` would do them."""

    def __init__(self, storages: StorageTrace, device: str, masked: bool = False) -> None:
        super().__init__(storages, sites=False)
        self._masked = masked
        self._stride = MOMENTS
        self._on_cpu = device == "cpu"
        self.widens = self._on_cpu and cpu_matmul.computes_in_fp32()
        self._results: dict[Any, list[tuple[Any, Any, torch.dtype]]] = {}
        """Shape, strides and type of what an operation returned for such arguments: layers are alike, and on the meta
        device most operations are slow Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        # A CPU without bf16 products holds fp32 copies of operands beside the result.
        if self.widens and (sizes := cpu_matmul.workspace(func, args, kwargs or {})):
            with self:
                copies = [torch.empty(size, dtype=torch.float32, device="meta") for size in sizes]
                del copies
        return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Models look whether a mask would hide nothing, and make none then.
        if func is torch.ops.aten._local_scalar_dense.default:
            return not self._masked if args[0].dtype == torch.bool else 0
        if self._on_cpu and torch.Tag.pointwise in func.tags:
            self._cast(func, [x for x in args if isinstance(x, Tensor) and x.dim()])
        if not _makes_new(func):
            return func(*args, **kwargs)
        key = (func, _signature(args), _signature(tuple(sorted(kwargs.items()))))
        known = self._results.get(key)
        if known is not None:
            made = [torch.empty_strided(*sizes, dtype=dtype, device="meta") for *sizes, dtype in known]
            return made[0] if len(made) == 1 else tuple(made)
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, tuple) else (result,)
        if all(isinstance(output, Tensor) and output.is_meta for output in outputs):
            self._results[key] = [(output.shape, output.stride(), output.dtype) for output in outputs]
        return result

    def _cast(self, func: Any, operands: list[Tensor]) -> None:
        """On a CPU operands of mixed types are copied to the common one first (ATen/TensorIterator.cpp)."""
        if len({x.dtype for x in operands}) < 2:
            return
        common = functools.reduce(torch.promote_types, (x.dtype for x in operands))
        in_place = func._schema.is_mutable and operands[0].dtype != common
        with self:
            copies = [torch.empty_like(x, dtype=common) for x in operands if x.dtype != common]
            copies += [torch.empty_like(operands[0], dtype=common)] if in_place else []
            del copies


@functools.cache
def _makes_new(func: Any) -> bool:
    """Whether all that `func` returns is new, and nothing that it is given is changed."""
    schema = func._schema
    return not schema.is_mutable and all(value.alias_info is None for value in schema.returns)


def _signature(value: Any) -> Any:
    """What an operation's result depends on, without the numbers in tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_signature(item) for item in value)
    return (type(value), value)
