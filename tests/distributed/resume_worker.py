"""One rank that trains a rule on gradients that are known beforehand, from a checkpoint on or anew, and saves.

Started by `ranks.launch` with the path of a JSON of settings as only argument; `steps` is a list of arguments of
`save`, whose `save` is the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from plugins_worker import Model, gradients
from ranks import serve

import toolkit
from toolkit.checkpoint.store import Store
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.run.saving import Saver
from toolkit.zero.checkpoint import load


def save(folder: str, optimizer: dict[str, Any], stage: int, at: list[int], source: str | None = None) -> list[str]:
    """Train, and save after each of the steps `at`; what was said of the state of `source`."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000},
        "optimizer": optimizer,
        "steps_per_print": 10**9,
    }
    engine, *_ = toolkit.initialize(model=Model(), config=config)
    said = [] if source is None else load(engine, open_checkpoint(Path(source)))
    saver = Saver(engine, Store(Path(folder), keep_last=len(at)))
    for step in at:
        while engine.global_steps < step:
            engine.backward(engine(gradients(engine.global_steps, dist.get_rank())))
            engine.step()
        saver.now(step, {})
    saver.close()
    engine.destroy()
    return said


if __name__ == "__main__":
    serve({"save": save})
