"""What each micro-batch of a step counts: of conversations, as much as it has predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError
from toolkit.run import ranks

if TYPE_CHECKING:
    import torch


def weighed(
    batches: Iterator[torch.Tensor], accumulation: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """This rank's micro-batches of one step on `device`, each with its share; every rank must call this.

    The share is what the mean loss of a micro-batch is to be multiplied by before the mean over micro-batches and ranks
    is taken, 0-d fp32. With n predictions in it, and N in all M micro-batches of the step on all ranks, it is n M / N:
    so each prediction counts the same, wherever it lies. None, of text: all have as many.
    """

    def taken() -> torch.Tensor:
        tokens = next(batches)
        if device.type == "cpu":
            return tokens
        # Out of other memory, a copy may make the host wait for the device.
        return tokens.pin_memory().to(device, non_blocking=True)

    first = taken()
    if first.dim() == 2:
        yield first, None
        for _ in range(accumulation - 1):
            yield taken(), None
        return
    from torch import distributed

    from toolkit.models import predictions

    step = [first, *(taken() for _ in range(accumulation - 1))]
    counts = [predictions(tokens).double() for tokens in step]
    mean = sum(counts[1:], counts[0]) / (accumulation * ranks.world_size())
    distributed.all_reduce(mean)
    for tokens, count in zip(step, counts, strict=True):
        yield tokens, (count / mean).float()


def check_apart(engine: Any) -> None:
    """Look whether the model of `engine` keeps the conversations of a sequence apart; every rank must call this.

    Architectures whose loss is known are known for this, too.

    Raises:
        UserError: another beginning of the sequence changes what is predicted in its second conversation.
    """
    import torch

    from toolkit.models.loss import CHUNKABLE

    kind = engine.module.hf.config.model_type
    if kind in CHUNKABLE:
        return
    losses = []
    engine.eval()
    try:
        for token in (1, 2):
            tokens = [[token, token, 3, 4, 5], [-100, -100, -100, 4, 5], [0, 1, 0, 1, 2]]
            with torch.no_grad():
                losses.append(float(engine(torch.tensor([tokens], device=engine.device))))
    except TypeError:  # it takes no places
        losses = [0.0, 1.0]
    engine.train()
    if abs(losses[0] - losses[1]) > 1e-5 * abs(losses[0]):
        raise UserError(
            f"{kind!r} models do not keep the conversations of a sequence apart, and cannot be trained on them here."
        )
