"""Models whose weights are drawn on the device itself: the toolkit draws them on the CPU, minutes for 8B."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from measuring.record import Recorder


def filled(name: str, device: str, *, activations: Any = None) -> Any:
    """The model that `toolkit.models.build_model` builds in bf16, with other random weights, on `device`."""
    from toolkit.models import load_config
    from toolkit.models.build import complete, skeleton

    config, preset = load_config(name)
    hf: Any = skeleton(config, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    made: dict[nn.Parameter, nn.Parameter] = {}  # by placeholder, so that tied parameters stay tied
    for module in list(hf.modules()):
        for key, placeholder in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if placeholder not in made:
                value = torch.ones(placeholder.shape, dtype=placeholder.dtype, device=device)
                if value.dim() > 1:
                    value.normal_(0.0, 0.02, generator=generator)
                made[placeholder] = nn.Parameter(value)
            module.register_parameter(key, made[placeholder])
    hf.to(device)  # the buffers
    return complete(hf, preset, activations, None)


def engine_of(model: Any, recorder: Recorder, **changed: Any) -> tuple[Any, dict[str, Any]]:
    """A DeepSpeed engine at stage 2 around `model`, and the JSON; `changed` keys of it."""
    import toolkit
    from toolkit.config import load_config
    from toolkit.run import ranks

    ranks.prepare_environment()
    ranks.start()
    config = load_config("amcs_zero2") | {"train_micro_batch_size_per_gpu": 1} | changed
    engine, *_ = toolkit.initialize(model=model, config=config, total_steps=100)
    assert engine.device.type == recorder.device, engine.device
    return engine, config


def random_tokens(name: str, rows: int, length: int, device: Any) -> torch.Tensor:
    from toolkit.models import load_config

    return torch.randint(load_config(name)[0].vocab_size, (rows, length + 1), device=device)
