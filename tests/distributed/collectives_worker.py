"""One rank that trains under ZeRO and writes down which collectives it takes part in and when its host needs a number.

Started by `ranks.launch`. On a CPU nothing waits for a device; what counts is who asks for a number:
`_local_scalar_dense` (`.item()`, `bool(tensor)`, `float(tensor)`) and `HostCopy.wait`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from worker import small_model

import toolkit
from toolkit.zero import full_precision_state_dict
from toolkit.zero.gradients import HostCopy
from toolkit.zero.wire import Wire


class Recorder(TorchDispatchMode):
    """`seen`: the collectives, with their elements, and what the host asked for, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            first = args[0]
            while isinstance(first, (list, tuple)):
                first = first[0]
            self.seen.append(f"{name.removeprefix('c10d::').strip('_')} {first.numel()}")
        elif name == "aten::_local_scalar_dense":
            self.seen.append("scalar")
        return func(*args, **(kwargs or {}))


class Waits:
    """Counts calls of `HostCopy.wait`."""

    def __init__(self) -> None:
        self.count, wait = 0, HostCopy.wait

        def counted(copy: HostCopy) -> torch.Tensor:
            self.count += 1
            return wait(copy)

        HostCopy.wait = counted  # type: ignore[method-assign]


def train(case: dict[str, Any], waits: Waits) -> dict[str, Any]:
    """What happened in the last step, and how the training ended."""
    model, steps = small_model(layers=2), case.get("steps", 2)
    if case.get("plain"):
        case["config"]["optimizer"]["params"]["total_steps"] = steps
        parameters = list(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, config=case["config"], model_parameters=parameters)
    else:
        engine, *_ = toolkit.initialize(model=model, config=case["config"], total_steps=steps)
    if case.get("delays"):
        engine.optimizer._delays = True
    losses: list[float] = []
    result: dict[str, Any] = {}
    wire = Wire()
    for step in range(steps):
        if step % engine.gradient_accumulation_steps() == 0:
            wire.since()
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(0, 250, (2, 24), generator=generator)
        with Recorder() as forward:
            loss = engine(input_ids=tokens, labels=tokens).loss
        with Recorder() as backward:
            engine.backward(loss * (float("nan") if step == case.get("poison_at") else 1.0))
        with Recorder() as update:
            before = waits.count
            engine.step()
        losses.append(loss.item())
        result = {"forward": forward.seen, "backward": backward.seen, "step": update.seen}
        result |= {"waits": waits.count - before}
    result["wire"] = wire.since()
    result |= {"losses": losses, "applied": engine.was_step_applied(), "weights": full_precision_state_dict(engine)}
    zero = engine._config.zero_config
    result |= {"reduce_bucket_size": zero.reduce_bucket_size, "overlap_comm": zero.overlap_comm}
    result["timer_waits"] = engine.tput_timer.config.synchronized
    engine.destroy()
    return result


def main() -> None:
    settings = json.loads(Path(sys.argv[-1]).read_text())
    waits = Waits()
    results = {name: train(case, waits) for name, case in settings["cases"].items()}
    torch.save(results, Path(settings["out"]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
