"""The longest sequence that a model can be trained with on one kind of GPU, by optimizer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from toolkit.config import DeepSpeedSettings, load_config, shipped_configs
from toolkit.errors import UserError, nearest
from toolkit.estimate.predict import Case, Estimator, assumed_context, with_section
from toolkit.estimate.recommend import formats_of
from toolkit.models import load_config as load_model_config
from toolkit.optim import find_rule
from toolkit.records.activations import Activations
from toolkit.records.lora import LoRA

SHORTEST = 512
"""Tokens; below, activations matter so little that a plan should be asked."""


@dataclass(frozen=True)
class Way:
    """A column of the table: an optimizer with its state, and the DeepSpeed JSON for it."""

    optimizer: str
    state: str
    config: Mapping[str, Any]


class Fit(BaseModel):
    """What fits of one model in one way.

    Attributes:
        model, optimizer, state: the row and the column.
        gpu_memory: bytes of one GPU.
        seq_len: the longest that fits of those tried; None where not even SHORTEST tokens do.
        needs: predicted bytes of a GPU with it (with SHORTEST where none fits), the assumed context included.
        whole: whether that is as long as the model takes.
    """

    model: str
    optimizer: str
    state: str
    gpu_memory: int
    seq_len: int | None
    needs: int
    whole: bool


def ways(optimizers: Sequence[str], gpus: int, state_format: str, *, offload: bool) -> list[Way]:
    """The ways of training that are compared: ZeRO 2 on one GPU, ZeRO 3 on several.

    Raises UserError for an optimizer that has no shipped configuration.
    """
    known = {one.optimizer.lower(): one.optimizer for one in shipped_configs().values()}
    found = []
    for optimizer in optimizers:
        if optimizer.lower() not in known:
            names = ", ".join(sorted(known.values()))
            raise UserError(f"--optimizer is {optimizer!r}, but must be {names}.{nearest(optimizer, known.values())}")
        base = load_config(f"{optimizer.lower()}_zero{2 if gpus == 1 else 3}")
        if offload:
            base = with_section(base, ["zero_optimization"], {"offload_optimizer": {"device": "cpu"}})
        kind = base["optimizer"]["type"]
        if find_rule(kind) is None:
            found.append(Way(kind, "fp32", base))
            continue
        for state, params in formats_of(kind, state_format).items():
            config = with_section(base, ["optimizer", "params"], params)
            ds = DeepSpeedSettings.read(config)
            released = params.get("release_gradients", False)  # with offload that is for the host's memory
            if params["state_format"] == state_format and not (released and (offload or ds.waits_for)):
                found.append(Way(kind, state, config))
    return found


def lengths(model: str) -> list[int]:
    """The lengths that are tried, ascending: powers of two, and what the model is made for.

    Raises UserError for a model that takes fewer than SHORTEST tokens.
    """
    most = getattr(load_model_config(model)[0], "max_position_embeddings", None) or 2**15
    if most < SHORTEST:
        raise UserError(
            f"model {model!r} takes {most} tokens at most; `toolkit estimate` says what it needs with them."
        )
    found = [SHORTEST]
    while 2 * found[-1] <= most:
        found.append(2 * found[-1])
    return found if found[-1] >= most else [*found, most]


def fits(
    model: str,
    tried: Sequence[Way],
    memories: Sequence[int],
    gpus: int,
    activations: Activations | None = Activations(checkpoint=True),
    lora: LoRA | None = None,
    conversations: bool = False,
) -> list[Fit]:
    """What fits of `model` in each way and in each of `memories`, bytes of one GPU.

    One sequence a pass. `activations`: None is the model's default; `lora`, `conversations`: as of `Case`.

    Raises UserError as `Estimator.predict`.
    """
    estimator, candidates = Estimator(), lengths(model)
    context, found = assumed_context(gpus), []
    plain = Case(
        *(model, {}, gpus, 1, SHORTEST),
        activations=activations,
        loss="chunked",
        lora=lora,
        conversations=conversations,
    )
    for way in tried:
        needs: dict[int, int] = {}

        def needed(seq_len: int, way: Way = way, needs: dict[int, int] = needs) -> int:
            if seq_len not in needs:
                needs[seq_len] = estimator.peak(replace(plain, config=way.config, seq_len=seq_len)) + context
            return needs[seq_len]

        for memory in memories:
            count = _how_many(candidates, needed, memory)
            longest = candidates[count - 1] if count else None
            found.append(
                Fit(
                    model=model,
                    optimizer=way.optimizer,
                    state=way.state,
                    gpu_memory=memory,
                    seq_len=longest,
                    needs=needed(longest or SHORTEST),
                    whole=count == len(candidates),
                )
            )
    return found


def _how_many(candidates: Sequence[int], needed: Callable[[int], int], memory: int) -> int:
    """How many of these lengths, which ascend, need no more than `memory`."""
    return bisect_left(candidates, True, key=lambda seq_len: needed(seq_len) > memory)
