"""What a DeepSpeed JSON says, read once and typed: `DeepSpeedSettings`, which all others read in place of the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from toolkit.config.batch import stated
from toolkit.config.files import without_auto

if TYPE_CHECKING:
    import torch

    from toolkit.optim import RuleOptimizer

SPELLINGS = {
    "fp32": ("fp32", "float32", "float", "torch.float32"),
    "fp16": ("fp16", "float16", "half", "torch.float16"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
}
"""DeepSpeed's names for a data type (DtypeEnum), by the one that is used here."""

_FLAG = TypeAdapter(bool)
_IN_TORCH = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_NOWHERE = "none"
_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
"""Old keys of `zero_optimization`, true or false, and the sections that stand for them."""


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a DeepSpeed JSON in today's spelling, for what DeepSpeed takes in an older one too."""
    result = dict(config)
    zero = result.get("zero_optimization")
    if isinstance(zero, bool):  # stages 0 and 1
        result["zero_optimization"] = {"stage": int(zero)}
    elif isinstance(zero, Mapping):
        zero = dict(zero)
        for old, section in _OFFLOADS.items():
            if zero.pop(old, None):
                zero.setdefault(section, {"device": "cpu"})
        result["zero_optimization"] = zero
    if "bfloat16" in result:
        result.setdefault("bf16", result.pop("bfloat16"))
    return result


@dataclass(frozen=True)
class Buckets:
    """How much ZeRO sends and holds at a time, in elements, and whether it computes meanwhile (`overlap`)."""

    reduce: int
    sub_group: int
    prefetch: int
    live: int
    reuse: int
    persistent: int
    overlap: bool


@dataclass(frozen=True)
class DeepSpeedSettings:
    """A DeepSpeed JSON that has been validated.

    Attributes:
        stage: of ZeRO.
        computed: "bf16", "fp16" or "fp32", what the model computes in.
        gradients: the same of `data_types.grad_accum_dtype`; None where the JSON leaves that to DeepSpeed.
        optimizer, params: `optimizer.type`, None without, and `optimizer.params`.
        scheduler, scheduler_params: `scheduler.type`, None without, and `scheduler.params`.
        offload_optimizer, offload_param: the device that optimizer and weights are offloaded to, "none" without.
        batch: micro-batch, gradient accumulation and global batch (`toolkit.config.batch`), those that are stated.
        zero: `zero_optimization`.
    """

    stage: int = 0
    computed: str = "fp32"
    gradients: str | None = None
    optimizer: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    scheduler_params: Mapping[str, Any] = field(default_factory=dict)
    offload_optimizer: str = _NOWHERE
    offload_param: str = _NOWHERE
    batch: Mapping[str, int] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> DeepSpeedSettings:
        """From the content of a JSON; what is "auto" counts as left out."""
        config = current(without_auto(config))
        zero, optimizer, scheduler = (
            config.get(name) or {} for name in ("zero_optimization", "optimizer", "scheduler")
        )
        return cls(
            stage=int(zero.get("stage", 0)),
            computed=next((name for name in ("bf16", "fp16") if _enabled(config.get(name))), "fp32"),
            gradients=dtype_name(config.get("data_types", {}).get("grad_accum_dtype")),
            optimizer=optimizer.get("type"),
            params=optimizer.get("params", {}),
            scheduler=scheduler.get("type"),
            scheduler_params=scheduler.get("params", {}),
            offload_optimizer=_device(zero.get("offload_optimizer")),
            offload_param=_device(zero.get("offload_param")),
            batch=stated(config),
            zero=zero,
        )

    @property
    def dtype(self) -> torch.dtype:
        """`computed` as torch has it."""
        return torch_dtype(self.computed)

    @cached_property
    def buckets(self) -> Buckets:
        """Of `zero_optimization`; what it leaves open is DeepSpeed's own default."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        zero = DeepSpeedZeroConfig(**self.zero)
        return Buckets(
            reduce=int(zero.reduce_bucket_size),
            sub_group=int(zero.sub_group_size),
            prefetch=int(zero.prefetch_bucket_size),
            live=int(zero.max_live_parameters),
            reuse=int(zero.max_reuse_distance),
            persistent=int(zero.param_persistence_threshold),
            overlap=bool(zero.overlap_comm if zero.overlap_comm is not None else self.stage == 3),
        )

    # ---- the optimizer --------------------------------------------------------------------------------------------

    @property
    def rule(self) -> type[RuleOptimizer] | None:
        """The optimizer of this package that `optimizer` names, or None; a plug-in's once that has been imported."""
        from toolkit.optim import find_rule

        return find_rule(self.optimizer)

    @property
    def foreign(self) -> str:
        """The optimizer of DeepSpeed or torch, in lower case; empty for a rule, whatever its name, and without any."""
        return "" if self.rule else (self.optimizer or "").lower()

    @property
    def on_cpu_adam(self) -> bool:
        """Whether the step is that of DeepSpeed's Adam for hosts."""
        adam = self.foreign in ("adam", "adamw") and not self.params.get("torch_adam")
        return adam and self.offload_optimizer != _NOWHERE

    @property
    def state_format(self) -> str | Mapping[str, str]:
        """Of a rule's state; that of all others is "fp32"."""
        from toolkit.state.layout import DEFAULT_FORMAT

        found: str | Mapping[str, str] = self.params.get("state_format", DEFAULT_FORMAT) if self.rule else "fp32"
        return found

    @property
    def weights(self) -> str:
        """How the optimizer keeps weights: "bf16+8" and the like, in bf16; "fp32": as master weights."""
        from toolkit.state.layout import default_weights
        from toolkit.state.remainders import MASTER

        default = default_weights(self.state_format) if self.computed == "bf16" else MASTER
        return str(self.params.get("weights", default)) if self.rule else MASTER

    @property
    def without_masters(self) -> bool:
        """Whether a rule steps on bf16 weights themselves; else on fp32 master weights, or on an fp32 model."""
        from toolkit.state.remainders import MASTER

        return self.computed == "bf16" and self.stage > 0 and self.params.get("weights") != MASTER

    @property
    def waits_for(self) -> str:
        """The means over several parameters that a rule needs before it updates any; empty if none."""
        from toolkit.optim.rule import waits_for

        return waits_for(self.rule.rule.variants(self.params)) if self.rule else ""

    @property
    def releases_gradients(self) -> bool:
        """Whether a rule updates weights during the backward pass."""
        return self.params.get("release_gradients") is True


def dtype_name(spelling: Any) -> str | None:
    """ "fp32", "fp16" or "bf16" for any of DeepSpeed's names for it; None for others."""
    return next((name for name, spelt in SPELLINGS.items() if spelling in spelt), None)


def torch_dtype(name: str) -> torch.dtype:
    """What torch calls "fp32", "fp16" or "bf16"."""
    import torch

    found: torch.dtype = getattr(torch, _IN_TORCH[name])
    return found


def _enabled(section: Any) -> bool:
    return isinstance(section, Mapping) and _FLAG.validate_python(section.get("enabled", False))


def _device(section: Any) -> str:
    return str(section.get("device", _NOWHERE)) if isinstance(section, Mapping) else _NOWHERE
