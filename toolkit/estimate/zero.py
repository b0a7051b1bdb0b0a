"""What of a DeepSpeed JSON's zero_optimization decides how much is held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Of zero_optimization, in elements."""

    prefetch: int
    live: int
    reuse: int
    persistent: int


@dataclass(frozen=True)
class Zero:
    """What decides how much ZeRO holds; sizes in elements, as in zero_optimization."""

    stage: int
    world_size: int
    accumulation: int
    reduce_bucket: int
    overlap: bool
    sub_group: int
    limits: Limits
    optimizer_on: str = "none"
    weights_on: str = "none"

    @classmethod
    def read(cls, config: Mapping[str, Any], *, world_size: int, accumulation: int) -> Zero:
        """From a DeepSpeed JSON that has been validated, without "auto"."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        zero = DeepSpeedZeroConfig(**config.get("zero_optimization", {}))

        def place(part: Any) -> str:
            return "none" if part is None else str(getattr(part.device, "value", part.device))

        return cls(
            stage=int(zero.stage),
            world_size=world_size,
            accumulation=accumulation,
            reduce_bucket=int(zero.reduce_bucket_size),
            overlap=bool(zero.overlap_comm if zero.overlap_comm is not None else zero.stage == 3),
            sub_group=int(zero.sub_group_size),
            limits=Limits(
                prefetch=int(zero.prefetch_bucket_size),
                live=int(zero.max_live_parameters),
                reuse=int(zero.max_reuse_distance),
                persistent=int(zero.param_persistence_threshold),
            ),
            optimizer_on=place(zero.offload_optimizer),
            weights_on=place(zero.offload_param),
        )
