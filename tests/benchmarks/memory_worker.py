"""One rank of `memory.py`: a few training steps with every allocation counted.

Its argument is the path of a JSON: `config` (a DeepSpeed JSON), `optimizer` (a class of bitsandbytes, or null for the
JSON's), `model` (a preset), `steps`, `tokens`, `out`. Writes rank<n>.json there.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

PHASES = ("forward", "backward", "step")


def peaks(trace: dict[str, Any], first: int) -> dict[str, float]:
    """Largest "Total Allocated" of the CPU, by phase of the steps from `first` on, and what stays between steps."""
    events = trace["traceEvents"]
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"].split()[1], int(event["name"].split()[2]))
        for event in events
        if event.get("name", "").startswith("phase ") and event.get("ph") == "X"
    )
    spans = [span for span in spans if span[3] >= first]
    memory = sorted(
        (event["ts"], event["args"]["Total Allocated"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    )
    found = dict.fromkeys((*PHASES, "resident"), 0.0)
    place = 0
    level = 0.0
    for start, end, phase, _ in spans:
        while place < len(memory) and memory[place][0] <= end:
            moment, total = memory[place]
            if moment >= start:
                found[phase] = max(found[phase], level, total)
            level = total
            place += 1
        found[phase] = max(found[phase], level)
        if phase == "step":
            found["resident"] = max(found["resident"], level)
    return found


def count_every_thread() -> None:
    """Let the allocator count on threads that the profiler does not see: gloo's give back what they sent."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def build(settings: dict[str, Any]) -> Any:
    import toolkit
    from toolkit import models

    config = settings["config"]
    toolkit.register()
    zero3 = config if config["zero_optimization"]["stage"] == 3 else None
    model = models.build_model(settings["model"], dtype=torch.bfloat16, seed=0, zero3_config=zero3, loss="plain")
    if settings["optimizer"] is None:
        return toolkit.initialize(model=model, config=config, total_steps=1000)[0]
    import bitsandbytes
    import deepspeed

    optimizer = getattr(bitsandbytes.optim, settings["optimizer"])(model.parameters(), lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def main() -> None:
    settings = json.loads(Path(sys.argv[-1]).read_text())
    from toolkit.run import ranks

    ranks.prepare()
    device = ranks.start()
    steps = settings["steps"]
    on_gpu = device.type == "cuda"
    counting = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    if not on_gpu:
        count_every_thread()
        counting.start()
    engine = build(settings)
    vocabulary = engine.module.hf.config.vocab_size
    generator = torch.Generator().manual_seed(dist.get_rank())
    loss = None
    for step in range(steps):
        if on_gpu and step == 2:
            torch.cuda.reset_peak_memory_stats()
        tokens = torch.randint(0, vocabulary, (1, settings["tokens"] + 1), generator=generator).to(device)
        with record_function(f"phase forward {step}"):
            loss = engine(tokens)
        with record_function(f"phase backward {step}"):
            engine.backward(loss)
        del loss
        with record_function(f"phase step {step}"):
            engine.step()
    if on_gpu:
        found: dict[str, float] = {"peak": torch.cuda.max_memory_allocated(), "resident": torch.cuda.memory_allocated()}
    else:
        counting.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json")
            counting.export_chrome_trace(path)
            found = peaks(json.loads(Path(path).read_text()), first=2)
        found["peak"] = max(found[phase] for phase in PHASES)
    found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    Path(settings["out"], f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    ranks.finish()


if __name__ == "__main__":
    main()
