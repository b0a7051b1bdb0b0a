"""`--compile-model`: the blocks of a model compiled by torch, which makes few kernels of what lies between products.

Block by block, not the model as one: equal blocks are compiled once, and checkpointing, tiles and the loss stay as they
are.
"""

from __future__ import annotations

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.models.activations import checkpointable, kept_activations
from toolkit.models.presets import first_line

FLAG = "--compile-model"


def compile_blocks(model: nn.Module) -> None:
    """Have each block of `model` compiled when it first runs, within its budget for activations if it has one.

    The budget is torch's for the whole process: it holds for what else is compiled, until the next call.

    Raises UserError for a model that has none.
    """
    blocks = checkpointable(model)
    if not blocks:
        raise UserError(f"{FLAG}: the model has no blocks that can be told apart; leave the flag out.")
    budget = kept_activations(model).budget
    functorch.activation_memory_budget = 1.0 if budget is None else budget
    for block in blocks:
        block.compile()


def warm(model: nn.Module, tokens: Tensor, *, evaluates: bool) -> None:
    """Compile now what `compile_blocks` has marked: a forward and a backward pass of `tokens`, as `model` takes them,
    and if the run `evaluates` the forward pass without gradients.

    No parameter gets a gradient, random numbers are drawn as if it had not been. The first trainable parameter's
    gradient, and what a step keeps of its activations, are there meanwhile.

    Raises UserError where compiling fails.
    """
    first = next(p for p in model.parameters() if p.requires_grad)
    devices = [first.device] if first.is_cuda else []
    try:
        with torch.random.fork_rng(devices):
            torch.autograd.grad(model(tokens), first)
            if evaluates:
                with torch.no_grad():
                    model.eval()(tokens)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the compilers below raise many kinds
        raise UserError(f"{FLAG}: compiling the model failed ({first_line(error)}); leave the flag out.") from error
    finally:
        model.train()
