"""One rank that trains by the command line's arguments, several runs one after the other, and carries checkpoints over.

Started by the `deepspeed` launcher with the path of a JSON of settings as only argument; `steps` is a list of

* {"run": [arguments], "stop_at": step or null}: a run, asked by SIGTERM to stop after a step;
* {"carry": [arguments], "source": folder, "to": folder, "convert": bool}: an engine of a run takes a checkpoint over
  and saves it again, without a step between.

What each gave goes to rank<n>.pt: the exception's sentence or the summary; what was said of the conversion.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import toolkit.train
from toolkit.errors import UserError
from toolkit.run import ranks
from toolkit.run.settings import parse


def run(arguments: list[str], stop_at: int | None) -> Any:
    settings = parse(arguments)
    assert settings is not None
    step = toolkit.train._step

    def stopping(engine: Any, *rest: Any) -> float:
        loss = step(engine, *rest)
        if engine.global_steps == stop_at and ranks.rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    toolkit.train._step = stopping
    try:
        return toolkit.train.train(settings)
    except UserError as error:
        return str(error)
    finally:
        toolkit.train._step = step


def carry(arguments: list[str], source: str, to: str, convert: bool = False) -> Any:
    from toolkit.checkpoint.commands import find
    from toolkit.checkpoint.store import Store
    from toolkit.checkpoint.universal import open_checkpoint
    from toolkit.run.plan import make_plan
    from toolkit.run.saving import Saver
    from toolkit.zero.checkpoint import load

    settings = parse(arguments)
    assert settings is not None
    ranks.start()
    engine = toolkit.train._engine(make_plan(settings))
    found = open_checkpoint(find(Path(source)))
    try:
        said = load(engine, found, convert=convert)
    except UserError as error:
        return str(error)
    saver = Saver(engine, Store(Path(to)))
    saver.now(found.manifest.step, {key: value for key, value in found.manifest.facts.items() if key == "identity"})
    saver.close()
    return said


def main() -> None:
    ranks.prepare()
    import torch

    settings = json.loads(Path(sys.argv[-1]).read_text())
    results = []
    for step in settings["steps"]:
        if "run" in step:
            results.append(run(step["run"], step.get("stop_at")))
        else:
            arguments = step.pop("carry")
            results.append(carry(arguments, **step))
    torch.save(results, Path(settings["out"]) / f"rank{ranks.rank()}.pt")
    ranks.finish()


if __name__ == "__main__":
    main()
