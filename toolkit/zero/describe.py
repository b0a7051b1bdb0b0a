"""What an engine trains, in the words of the memory records."""

from __future__ import annotations

from typing import Any

from toolkit.models.activations import kept_activations
from toolkit.models.loss import LossHead
from toolkit.optim import RuleOptimizer
from toolkit.records.memory import Setup
from toolkit.state.layout import format_text


def describe(engine: Any, *, model: str = "", seq_len: int = 0) -> Setup:
    """The setup of `engine`.

    Args:
        engine: DeepSpeed's.
        model: its name; by default that of its class.
        seq_len: predictions of a sequence, 0 where not known.
    """
    module, basic = engine.module, engine.basic_optimizer
    hf = getattr(module, "hf", module)
    config = getattr(hf, "config", None)
    state_format, weights = "fp32", "fp32"
    if isinstance(basic, RuleOptimizer):
        state_format = format_text(basic.defaults["state_format"])
        weights = basic.defaults["weights"]
    offload = []
    for name, setting in (("optimizer", engine.zero_offload_optimizer()), ("param", engine.zero_offload_param())):
        device = getattr(setting, "device", None)
        if device is not None and str(getattr(device, "value", device)) != "none":
            offload.append(name)
    return Setup(
        model=model or type(hf).__name__,
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters()),
        optimizer=type(basic).__name__,
        stage=int(engine.zero_optimization_stage()),
        state_format=state_format,
        weights=weights,
        offload=offload,
        world_size=int(engine.world_size),
        micro_batch=int(engine.train_micro_batch_size_per_gpu()),
        gradient_accumulation=int(engine.gradient_accumulation_steps()),
        seq_len=seq_len,
        activations=kept_activations(module),
        attention=str(getattr(config, "_attn_implementation", None) or "unknown"),
        loss="chunked" if any(isinstance(part, LossHead) for part in module.modules()) else "plain",
        device="cuda" if engine.device.type == "cuda" else "cpu",
    )
