"""Calls of a loop of one's own that DeepSpeed answers with wrong numbers in silence, or with an unclear error.

* `engine.backward(loss)` in fp16 without ZeRO: gradients are divided by a scale that the loss was not multiplied with.
* `engine.zero_grad()` leaves ZeRO's gradients as they are; here it drops them.
* `engine.backward(loss, retain_graph=True)` at stage 3: a second backward pass of the graph finds no weights gathered.
* Two engines of one model at ZeRO stages: the first takes the gradients, the second trains on zeros.
* `engine.no_sync()` under ZeRO, which adds up gradients over ranks as they come.
* `copy.deepcopy` of an engine, and at stage 3 of its model: a copy would have no weights, or not run.
* `add_param_group` of the optimizer inside an engine: nothing steps the group.
* Parameters without dimensions, or not contiguous: an error about bytes.
* A second `destroy`, which Python makes itself when an engine is collected, would take the model from its next engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from toolkit.config.machine import UNSUMMED
from toolkit.errors import UserError, some
from toolkit.zero.access import Access

_COUNTS = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
"""Where DeepSpeed counts the backward passes that a module's forward passes allow (`parameter_offload.py`)."""


def install(engine: Any) -> None:
    """Put these in place of `engine`'s methods; it is DeepSpeed's class."""
    backward, zero_grad, destroy = engine.backward, engine.zero_grad, engine.destroy
    broadcast_model, no_sync = engine._broadcast_model, engine.no_sync

    def backward_of(self: Any, loss: Tensor, retain_graph: bool = False, *args: Any, **kwargs: Any) -> Any:
        again = retain_graph and self.zero_optimization_partition_weights()
        scale = _scale(self)
        if scale is not None:
            return backward(self, loss.float() * scale, retain_graph, *args, **kwargs) / scale
        with _counts_kept(self.module) if again else nullcontext():
            return backward(self, loss, retain_graph, *args, **kwargs)

    def zero_grad_of(self: Any) -> None:
        if isinstance(self.optimizer, Access):
            self.optimizer.zero_grad()  # type: ignore[attr-defined]
        zero_grad(self)

    def destroy_of(self: Any) -> None:
        if not getattr(self, "leanstate_destroyed", False):
            self.leanstate_destroyed = True
            destroy(self)
            _release(self)

    def broadcast_model_of(self: Any) -> None:
        _lay_out(self.module)
        broadcast_model(self)

    def no_sync_of(self: Any) -> Any:
        if self.zero_optimization():
            raise UserError(
                "engine.no_sync() works at stage 0 only, since ZeRO adds up gradients over ranks as they come; for "
                "several micro-batches a step give gradient_accumulation_steps"
            )
        return no_sync(self)

    def copy_of(self: Any, memo: Any) -> Any:
        raise UserError(
            "an engine cannot be copied: it holds connections to other ranks; build another model and engine, and load "
            "a checkpoint"
        )

    engine.no_sync, engine.__deepcopy__ = no_sync_of, copy_of
    engine.backward, engine.zero_grad, engine.destroy = backward_of, zero_grad_of, destroy_of
    engine._broadcast_model = broadcast_model_of


def _scale(engine: Any) -> float | None:
    """What the loss is to be multiplied with; None where DeepSpeed does that, or nothing is."""
    config = getattr(engine.optimizer, "loss_scale_config", None)
    if config is None or not config.use_grad_scaling or isinstance(engine.optimizer, ZeROOptimizer):
        return None
    engine.optimizer.leanstate_scale = engine.optimizer.loss_scale
    return float(engine.optimizer.leanstate_scale)


def unscale_by_what_scaled(engine: Any) -> None:
    """Without ZeRO, let gradients in fp16 be divided by the scale of their loss, and so the norm that is reported.

    DeepSpeed's step grows the scale first, where it is time for that.
    """
    wrapper = engine.optimizer
    if not isinstance(wrapper, FP16_UnfusedOptimizer) or not wrapper.loss_scale_config.use_grad_scaling:
        return
    unscale, config = wrapper.unscale_and_clip_grads, wrapper.loss_scale_config

    def unscale_and_clip(total_norm: Any, apply_scale: bool = True) -> Any:
        next_scale, config.cur_scale = config.cur_scale, wrapper.leanstate_scale
        wrapper._global_grad_norm = total_norm / config.cur_scale
        try:
            return unscale(total_norm, apply_scale)
        finally:
            config.cur_scale = next_scale

    wrapper.unscale_and_clip_grads = unscale_and_clip


def _lay_out(module: nn.Module) -> None:
    """Make parameters contiguous, since DeepSpeed sends them as bytes; raise UserError for those without dimensions."""
    for name, param in module.named_parameters():
        if param.dim() == 0 and not hasattr(param, "ds_id"):
            raise UserError(
                f"parameter {name!r} has no dimensions, which DeepSpeed cannot send; give it one, of size 1"
            )
        if not param.is_contiguous():
            param.data = param.data.contiguous()


def no_copies(engine: Any) -> None:
    """At stage 3, let `copy.deepcopy` of parameters fail: copies would be empty, or of a model that cannot run."""
    for name, param in engine.module.named_parameters() if engine.zero_optimization_partition_weights() else ():
        param.__deepcopy__ = partial(_not_copied, name)


def _not_copied(name: str, memo: dict[int, Any]) -> Any:
    raise UserError(
        f"parameter {name!r} cannot be copied at stage 3, where a rank holds its part only: clone() inside "
        "deepspeed.zero.GatheredParameters gives the whole, and engine.save_16bit_model or a checkpoint the model"
    )


def check_alive(engine: Any) -> None:
    """Raise UserError for an engine that was destroyed: it would write its weights over those of the next."""
    if getattr(engine, "leanstate_destroyed", False):
        raise UserError("this engine was destroyed and cannot make a step any more; use the one that was made after it")


@contextmanager
def _counts_kept(module: nn.Module) -> Iterator[None]:
    """Let the backward pass inside be followed by another one of the same graph."""
    kept = [(one, {key: one.__dict__[key] for key in _COUNTS if key in one.__dict__}) for one in module.modules()]
    yield
    for one, counts in kept:
        one.__dict__.update(counts)


def check_free(module: nn.Module, *, zero: bool) -> None:
    """Raise UserError if an engine trains parameters of `module` under ZeRO; before another has hooked itself in.

    `zero`: whether that is under ZeRO, too, and two parameters may not lie in one memory. A cast takes them apart.
    """
    if zero:
        _check_apart(_trainable(module))
    taken = [name for name, param in _trainable(module) if hasattr(param, "leanstate_engine")]
    if taken:
        raise UserError(
            f"{some(taken, 3)}: trained under ZeRO by another engine already, which would take the gradients; call "
            "destroy() on that engine first, or build the model anew if making that engine failed"
        )


def _trainable(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, param) for name, param in module.named_parameters() if param.requires_grad]


def check_sequences(engine: Any) -> None:
    """Raise UserError if ranks share sequences and gradients are added up among those that do not."""
    size = engine.sequence_parallel_size
    if size > 1 and engine.seq_dp_world_size == engine.dp_world_size:
        raise UserError(UNSUMMED.format(size=size))


def claim(engine: Any) -> None:
    """Let nobody else train the parameters of `engine` from now on, if it does so under ZeRO.

    Before the engine's optimizer is made: it hooks up parameters even if it fails later.
    """
    check_free(engine.module, zero=bool(engine.zero_optimization()))
    for _, param in _trainable(engine.module) if engine.zero_optimization() else ():
        param.leanstate_engine = id(engine)


def _check_apart(params: Sequence[tuple[str, Tensor]]) -> None:
    """Raise UserError for two parameters that lie in the same place: ZeRO moves each to one of its own."""
    found: dict[tuple[torch.device, int], str] = {}
    for name, param in params:
        if param.numel() and param.data_ptr():
            other = found.setdefault((param.device, param.data_ptr()), name)
            if other != name:
                raise UserError(
                    f"{other} and {name} are two parameters in one memory, which ZeRO takes apart; to tie them, assign "
                    "one nn.Parameter to both modules"
                )


def _release(engine: Any) -> None:
    for param in engine.module.parameters():
        if getattr(param, "leanstate_engine", None) == id(engine):
            del param.leanstate_engine


def no_more_groups(param_group: dict[str, Any]) -> None:
    """In place of an optimizer's `add_param_group`, once DeepSpeed has made tensors of its own of all parameters."""
    raise UserError(
        "add_param_group after the engine was made: it steps the parameters that it was made with; give initialize all "
        "of them, those to be trained later in a group whose lr is 0 until then"
    )
