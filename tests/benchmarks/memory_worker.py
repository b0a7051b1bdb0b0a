"""One rank of `memory.py` and `prediction.py`: a few training steps, the last of them traced whole.

Its argument is the path of a JSON: `config` (a DeepSpeed JSON), `optimizer` (a class of bitsandbytes, or null: the
JSON's), `model` (a preset), `steps`, `micro_batch`, `seq_len`, `activations`, `loss`, `chat` (three conversations in a
sequence, in place of text), `out`. Writes rank<n>.json there: bytes at the peak, by phase and between steps, and by
category at the peak.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from toolkit.memory.trace import StepTrace, count_from_here
from toolkit.records import categories as c
from toolkit.records.activations import Activations


def build(settings: dict[str, Any]) -> Any:
    import toolkit
    from toolkit import models
    from toolkit.config import DeepSpeedSettings
    from toolkit.zero.places import places

    config = settings["config"]
    toolkit.register()
    model = models.build_model(
        settings["model"],
        dtype=torch.bfloat16,
        seed=0,
        zero3_config=config if config["zero_optimization"]["stage"] == 3 else None,
        loss=settings["loss"],
        activations=Activations.read(settings["activations"]),
        place=places(DeepSpeedSettings.read(config)) if settings["optimizer"] is None else None,
    )
    if settings["optimizer"] is None:
        return toolkit.initialize(model=model, config=config, total_steps=1000)[0]
    import bitsandbytes
    import deepspeed

    optimizer = getattr(bitsandbytes.optim, settings["optimizer"])(model.parameters(), lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def main() -> None:
    settings = json.loads(Path(sys.argv[-1]).read_text())
    from toolkit.run import ranks
    from toolkit.zero.inventory import inventory

    ranks.prepare_environment()
    device = ranks.start()
    on_gpu = device.type == "cuda"
    if not on_gpu:
        count_from_here()
    engine = build(settings)
    head = engine.module.hf.get_output_embeddings()
    generator = torch.Generator().manual_seed(dist.get_rank())
    accumulation = engine.gradient_accumulation_steps()

    def pass_once(phase: Any) -> None:
        shape = (settings["micro_batch"], settings["seq_len"] + 1)
        tokens = torch.randint(0, engine.module.hf.config.vocab_size, shape, generator=generator)
        if settings["chat"]:
            places = torch.arange(shape[1]) % -(-shape[1] // 3)
            tokens = torch.stack([tokens, tokens, places.expand(shape)], dim=1)
        tokens = tokens.to(device)
        phase(c.FORWARD)
        loss = engine(tokens)
        phase(c.BACKWARD)
        engine.backward(loss)
        del loss
        phase(c.STEP)
        engine.step()

    for _ in range(settings["steps"] - 1):
        for _ in range(accumulation):
            pass_once(lambda name: None)
    trace = StepTrace(engine.module, head, lambda: inventory(engine), on_gpu=on_gpu)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with trace:
        for _ in range(accumulation):
            pass_once(trace.phase)
    curve = trace.curve
    found: dict[str, Any] = {phase.name: phase.peak for phase in curve.by_phase()}
    found["peak"] = torch.cuda.max_memory_allocated() if on_gpu else int(curve.total.max())
    found["resident"] = int(curve.total[-1])
    found["held"] = curve.at(curve.peak_at)
    found["phase"] = curve.phase_at(curve.peak_at)
    found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    Path(settings["out"], f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    ranks.finish()


if __name__ == "__main__":
    main()
