"""What a run steps with: DeepSpeed's engine around its model, its batches, and one optimizer step."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from toolkit.run import heap, monitors, ranks
from toolkit.run.prepare import PreparedRun
from toolkit.run.weighing import weighed

if TYPE_CHECKING:
    import torch

    from toolkit.data import PackedTokens, Position
    from toolkit.data.batches import Batches


def build_engine(prepared: PreparedRun, config: Mapping[str, Any] | None = None) -> Any:
    """DeepSpeed's engine around the run's model, without monitors. `config`: in place of the run's."""
    import torch

    import toolkit
    from toolkit import memory, models
    from toolkit.zero.places import places

    settings = prepared.settings
    config = {name: section for name, section in (config or prepared.config).items() if name not in monitors.SECTIONS}
    on_cpu = not torch.accelerator.is_available()
    if settings.memory_profile == "full" and on_cpu:
        memory.count_from_here()
    # At stage 3 the model is partitioned while it is built, so the layout of partitions must be in place.
    toolkit.register()
    model = models.build_model(
        settings.model,
        dtype=prepared.ds.dtype,
        seed=settings.seed,
        zero3_config=config if prepared.ds.stage == 3 else None,
        from_checkpoint=settings.from_checkpoint,
        activations=settings.activations,
        loss=settings.loss,
        lora=settings.lora,
        place=places(prepared.ds),
    )
    engine, *_ = toolkit.initialize(model=model, config=config, total_steps=settings.steps)
    if on_cpu:
        heap.give_back()
    return engine


def open_batches(prepared: PreparedRun, packed: PackedTokens, start: Position | None) -> Batches:
    """This rank's micro-batches of `packed` from `start` on; every rank must call this."""
    from toolkit import data

    return data.rank_batches(
        packed,
        rank=ranks.rank(),
        world_size=prepared.batch.world_size,
        micro_batch=prepared.batch.micro,
        start=start,
        cache=data.open_cache(
            packed,
            {part: prepared.identity[part] for part in ("tokenizer", "data")},
            ranks.from_first(secrets.token_hex(8)),
        ),
    )


def optimizer_step(engine: Any, batches: Iterator[torch.Tensor], accumulation: int) -> torch.Tensor:
    """One optimizer step; returns this rank's mean loss over its micro-batches, 0-d fp64, on the device."""
    total: Any = 0.0
    for tokens, share in weighed(batches, accumulation, engine.device):
        loss = engine(tokens)
        if share is not None:
            loss = loss * share
        engine.backward(loss)
        engine.step()
        # Kept on the device: to read it here would make the host wait once a micro-batch.
        total = total + loss.detach().float()
    return total.double() / accumulation
