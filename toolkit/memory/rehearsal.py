"""A training step on the meta device: every tensor has a size, none takes memory, and no number is computed.

The model's own code runs, forward and backward, so any architecture is covered. What kernels hold inside, and what
depends on the device, is modelled here: attention and the chunked loss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from toolkit.memory import categories as c
from toolkit.memory.tape import Tape
from toolkit.memory.tracker import Tracker
from toolkit.models.build import CausalLM, blueprint
from toolkit.models.loss import LossHead

MOMENTS = 4
"""From one birth or death to the next: between them is room for what ZeRO does at that point."""


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
class Rehearsal:
    """What one micro-batch of one rank makes and frees, without anything that ZeRO or the optimizer holds.

    `tape` has the phases forward and backward; its gradients are freed as soon as they are whole, at the moments of
    `arrivals` (number of the parameter, moment). `calls` are in order.
    """

    model: CausalLM
    tape: Tape
    parameters: list[Parameter]
    arrivals: list[tuple[int, int]]
    calls: list[Call]
    per_block: dict[str, int]
    loss: str
    checkpointing: bool
    attention: str


def rehearse(
    model: str,
    *,
    dtype: torch.dtype,
    micro_batch: int,
    seq_len: int,
    device: str,
    activation_checkpointing: bool | None = None,
    loss: str | None = None,
    attention: str | None = None,
    layers: int | None = None,
) -> Rehearsal:
    """Rehearse a forward and a backward pass.

    Args:
        model: a preset or a folder, as for `toolkit.models.build_model`.
        dtype: that the model computes in.
        micro_batch, seq_len: sequences of a forward pass, and predictions per sequence.
        device: "cuda" or "cpu", whose kernels are assumed.
        activation_checkpointing, loss: None is the model's default.
        attention: "sdpa", "eager" or another of transformers' names; None is the model's default.
        layers: only so many of the model's.

    Raises:
        UserError: as `build_model`.
    """
    built = blueprint(
        model,
        dtype=dtype,
        on_gpu=device == "cuda",
        activation_checkpointing=activation_checkpointing,
        loss=loss,
        attention=attention,
        layers=layers,
    )
    built.train()
    tape = Tape()
    tracker = _MetaTracker(tape, device)
    for tensor in [*built.parameters(), *built.buffers()]:
        tracker.adopt(tensor, None)
    arrivals: list[tuple[int, int]] = []

    def arrived(number: int, parameter: nn.Parameter) -> None:
        arrivals.append((number, tape.now))
        parameter.grad = None

    head = built.hf.get_output_embeddings()
    if isinstance(head, LossHead):
        head.kernel = _Loss.of(head.kernel, device)
    calls: list[Call] = []
    numbers = {id(p): number for number, p in enumerate(built.parameters())}
    hooks = _watch_calls(built, tape, numbers, calls)
    tracker.attach(built, head, arrived)
    tokens = torch.zeros(micro_batch, seq_len + 1, dtype=torch.int64, device="meta")
    tracker.adopt(tokens, None)
    with tracker, _attention(device):
        tape.begin(c.FORWARD)
        value = built(tokens)
        tape.begin(c.BACKWARD)
        value.backward()
        del value
    tracker.detach()
    for hook in hooks:
        hook.remove()
    tape.classify()
    return Rehearsal(
        model=built,
        tape=tape,
        parameters=[Parameter(name, tuple(p.shape)) for name, p in built.named_parameters()],
        arrivals=arrivals,
        calls=calls,
        per_block=_per_block(built, tape),
        loss="chunked" if isinstance(head, LossHead) else "plain",
        checkpointing=any(getattr(module, "gradient_checkpointing", False) for module in built.modules()),
        attention=str(built.hf.config._attn_implementation),
    )


def scaled(two: Rehearsal, three: Rehearsal, micro_batch: int) -> Rehearsal | None:
    """The rehearsal of `micro_batch` sequences, from those of two and three; None if they differ in more than size.

    Every tensor's size is linear in the number of sequences, as long as the same operations run. (With one sequence
    some copies are left out.)
    """

    def pattern(rehearsal: Rehearsal) -> list[tuple[int, int | None, str]]:
        return [(life.born, life.died, life.what) for life in rehearsal.tape.lives]

    if pattern(two) != pattern(three):
        return None
    lives = [
        replace(small, bytes=small.bytes + (large.bytes - small.bytes) * (micro_batch - 2))
        for small, large in zip(two.tape.lives, three.tape.lives, strict=True)
    ]
    return replace(two, tape=replace(two.tape, lives=lives))


def _watch_calls(model: nn.Module, tape: Tape, numbers: dict[int, int], calls: list[Call]) -> list[Any]:
    hooks = []
    for module in model.modules():
        own = tuple(numbers[id(p)] for p in module.parameters(recurse=False))
        running: list[Call] = []

        def opens(*_: Any, own: tuple[int, ...] = own, running: list[Call] = running) -> None:
            running.append(Call(tape.now, None, own))
            calls.append(running[-1])

        def closes(*_: Any, running: list[Call] = running) -> None:
            running.pop().closed = tape.now

        hooks.append(module.register_forward_pre_hook(opens))
        hooks.append(module.register_forward_hook(closes, always_call=True))
    return hooks


def _per_block(model: CausalLM, tape: Tape) -> dict[str, int]:
    """Of the first transformer layer, in its forward call: what it keeps, and the most that it holds meanwhile."""
    layers = [scope for scope in tape.scopes if scope.name.rsplit(".", 1)[-1] == "0"]
    if not layers or layers[0].closed is None:
        return {}
    opened, closed = layers[0].opened, layers[0].closed
    mine = [life for life in tape.lives if opened <= life.born < closed]
    changes: dict[int, int] = {}
    for life in mine:
        changes[life.born] = changes.get(life.born, 0) + life.bytes
        if life.died is not None and life.died < closed:
            changes[life.died] = changes.get(life.died, 0) - life.bytes
    held = largest = 0
    for moment in sorted(changes):
        held += changes[moment]
        largest = max(largest, held)
    return {"kept": held, "largest moment": largest}


class _MetaTracker(Tracker):
    """Tracks operations on the meta device as `device` would do them."""

    def __init__(self, tape: Tape, device: str) -> None:
        super().__init__(tape, sites=False)
        self._stride = MOMENTS
        self._on_cpu = device == "cpu"
        self._results: dict[Any, list[tuple[Any, Any, torch.dtype]]] = {}
        """Shape, strides and type of what an operation returned for such arguments: layers are alike, and on the meta
        device most operations are slow Python."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Models look into masks to leave out those that hide nothing; training data are packed, so none does.
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 0
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


@contextmanager
def _attention(device: str) -> Iterator[None]:
    """Lets `scaled_dot_product_attention` be the kernel that `device` would choose.

    In place of torch's own function: a torch function mode would not be there while layers are computed again.
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = functools.partial(_attend, device)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _attend(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten = torch.ops.aten
    if device == "cpu" and _cpu_has_flash(query, key, value, attn_mask, is_causal, enable_gqa):
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        result: Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return result
    half = query.dtype in (torch.bfloat16, torch.float16)
    if device == "cuda" and half and attn_mask is None and query.shape[-1] <= 256:
        result = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return result
    if device == "cuda" and not enable_gqa:
        efficient = aten._scaled_dot_product_efficient_attention
        result = efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
        return result
    math = aten._scaled_dot_product_attention_math
    result = math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    return result


def _cpu_has_flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> bool:
    """Asks torch, with tensors of a few positions: the choice does not depend on how many there are."""
    # Real tensors, and only here: whatever is alive in the rehearsal is on the meta device.
    with torch.utils._python_dispatch._disable_current_modes():
        return _flash_is_chosen(query, key, value, mask, is_causal, enable_gqa)


def _flash_is_chosen(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> bool:
    few = [torch.empty(1, x.shape[1], 2, x.shape[3], dtype=x.dtype, requires_grad=True) for x in (query, key, value)]
    small = None if mask is None else torch.ones(1, 1, 2, 2, dtype=mask.dtype)
    choose: Any = torch._fused_sdp_choice
    choice = choose(*few, small, 0.0, is_causal, enable_gqa=enable_gqa)
    return bool(choice == SDPBackend.FLASH_ATTENTION.value)


class _Loss(torch.autograd.Function):
    """The memory of a chunked loss: hidden [tokens, hidden_size], weight [vocab, hidden_size] -> [tokens]."""

    @staticmethod
    def of(kernel: Any, device: str) -> Any:
        """Stands for `kernel`, one of `toolkit.models.loss`, on `device`."""
        eager_gradients = kernel.__name__ == "_liger_kernel"

        def rehearsed(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
            losses: Tensor = _Loss.apply(hidden, weight, targets, bias, device, eager_gradients)
            return losses.float().mean()

        return rehearsed

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, device: str, early: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden.detach(), weight.detach(), targets, bias.detach() if bias is not None else None)
        ctx.device, ctx.early = device, _on_gpu(hidden, weight, True) if early else None
        if not early:
            _chunks(device, hidden, weight, targets, bias, None)
        return hidden.new_empty(hidden.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias = ctx.saved_tensors
        found = ctx.early or _chunks(ctx.device, hidden, weight, targets, bias, gradient)
        return found[0], found[1], None, None if bias is None else torch.empty_like(bias), None, None


def _chunks(
    device: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, gradient: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What torch's linear_cross_entropy allocates; with `gradient`, also the gradients of hidden and weight."""
    if device == "cuda":
        return _on_gpu(hidden, weight, gradient is not None)
    from torch.nn.modules import linear_cross_entropy as torch_loss

    options = nn.LinearCrossEntropyOptions(batch_chunk_size=256)._adjust(
        num_batches=hidden.shape[0],
        in_features=hidden.shape[1],
        num_classes=weight.shape[0],
        dtype=hidden.dtype,
        device=torch.device("cpu"),
    )
    # torch's own Python, run on the meta device.
    found = torch_loss._linear_cross_entropy_batch_chunked_accumulator(
        hidden,
        weight,
        targets,
        bias,
        None,
        "none",
        -100,
        0.0,
        options.batch_chunk_size,
        options.acc_policy,
        options.acc_dtype,
        gradient is not None,
        gradient is not None,
        gradient is not None and bias is not None,
        loss_grad_output=gradient,
    )
    return found[1], found[2]


def _on_gpu(hidden: Tensor, weight: Tensor, gradients: bool) -> tuple[Tensor | None, Tensor | None]:
    """torch/nn/modules/linear_cross_entropy.py, policy "compact" on CUDA: fp32 logits of a chunk of tokens."""
    tokens, features = hidden.shape
    vocabulary = weight.shape[0]
    wide = -(-vocabulary // features)
    chunk = max(1, min((1 << (-(-tokens // wide) - 1).bit_length()) // 2, tokens))
    logits = hidden.new_empty(chunk, vocabulary, dtype=torch.float32)
    if not gradients:
        return None, None
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)
    narrow = logits.to(hidden.dtype)
    inputs = hidden.new_empty(chunk, features, dtype=torch.float32)
    del logits, narrow, inputs
    return of_hidden, of_weight
