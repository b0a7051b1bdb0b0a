"""One rank of `init.py`: builds a model and its engine with every allocation counted, then makes steps.

Its argument is the path of a JSON: `config` (a DeepSpeed JSON), `model` (a preset or folder), `steps`, `mapped`
(whether glibc maps large pieces by themselves), `out`. Writes rank<n>.json there, in bytes: `peak` of allocations and
`resident_set`, the largest, until the engine is there; `before`, the resident set when the model began; `held`,
allocated when the engine is there; `in_steps` and `steps_set`, the largest two in the steps, and `steady` and
`steady_set`, after them (null without `steps`); `largest`, of the model's largest layer or embedding as it is drawn:
fp32 and what it becomes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from toolkit.memory.trace import allocations, count_from_here
from toolkit.memory.watermarks import ResidentSet


def allocated() -> int:
    """Bytes that torch's CPU allocator has given out: those before an allocation that is made to be seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        torch.empty(1)
    return min(event.extra_fields.total_allocated for event in allocations(seen))


def main() -> None:
    settings = json.loads(Path(sys.argv[-1]).read_text())
    import toolkit
    from toolkit import models
    from toolkit.config import DeepSpeedSettings
    from toolkit.models.build import blocks, skeleton
    from toolkit.run import heap, ranks
    from toolkit.zero.places import places

    ranks.prepare_environment()
    ranks.start()
    count_from_here()
    toolkit.register()
    config, name = settings["config"], settings["model"]
    largest = max(
        sum(p.numel() for p in block.parameters()) for _, block in blocks(skeleton(models.load_config(name)[0]))
    )
    if settings["mapped"]:
        heap.map_large()  # as a run does where memory is scarce
    watermark = ResidentSet()
    found: dict[str, Any] = {"before": watermark.now(), "largest": 6 * largest}
    found |= dict.fromkeys(("in_steps", "steps_set", "steady", "steady_set"))
    watermark.begin()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model = models.build_model(
            name,
            dtype=torch.bfloat16,
            seed=0,
            zero3_config=config if config["zero_optimization"]["stage"] == 3 else None,
            place=places(DeepSpeedSettings.read(config)),
        )
        engine = toolkit.initialize(model=model, config=config, total_steps=1000)[0]
    found["resident_set"] = watermark.read()[1]
    found["peak"] = max(event.extra_fields.total_allocated for event in allocations(seen))
    del seen
    found["held"] = allocated()
    found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    tokens = torch.randint(0, engine.module.hf.config.vocab_size, (1, 9))
    heap.give_back()  # as every run on a CPU does
    watermark.begin()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for _ in range(settings["steps"]):
            engine.backward(engine(tokens))
            engine.step()
    if settings["steps"]:
        found |= {"steps_set": watermark.read()[1], "steady_set": watermark.now()}
        found["in_steps"] = max(event.extra_fields.total_allocated for event in allocations(seen))
        del seen
        found["steady"] = allocated()
    Path(settings["out"], f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    ranks.finish()


if __name__ == "__main__":
    main()
