"""One rank that trains by the command line's arguments, several runs one after the other, and carries checkpoints over.

Started by `ranks.launch` with the path of a JSON of settings as only argument; `steps` is a list of

* {"run": [arguments], "stop_at": step, "poison": [steps], "rates": number}: a run, asked by SIGTERM to stop after a
  step, with gradients of NaN in others, and a range test of so many rates at most;
* {"carry": [arguments], "source": folder, "to": folder, "convert": bool}: an engine of a run takes a checkpoint over
  and saves it again, without a step between; "beside": where the model beside its adapters is;
* {"stock": [arguments], "to": folder}: three steps, saved by DeepSpeed alone;
* {"universal": [arguments], "source": folder, "tag": name}: DeepSpeed's own loader reads its universal layout.

What each gave goes to rank<n>.pt: the exception's sentence or the summary and what was said; the sentences about a
conversion; what the engine holds.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import answer

import toolkit.train
from toolkit.errors import UserError
from toolkit.run import range_test, ranks, training
from toolkit.run.settings import parse


def run(
    arguments: list[str], stop_at: int | None = None, poison: tuple[int, ...] = (), rates: int = range_test.STEPS
) -> Any:
    step = training.optimizer_step
    range_test.STEPS = rates

    def stopping(engine: Any, *rest: Any) -> float:
        backward = engine.backward
        if engine.global_steps + 1 in poison:
            engine.backward = lambda loss: backward(loss * float("nan"))
        loss = step(engine, *rest)
        engine.backward = backward
        if engine.global_steps == stop_at and ranks.rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    training.optimizer_step = stopping
    said = io.StringIO()
    try:
        settings = parse(arguments)
        assert settings is not None
        with contextlib.redirect_stdout(said):
            summary = toolkit.train.train(settings)
        return summary | {"said": said.getvalue()}
    except UserError as error:
        return str(error)
    finally:
        training.optimizer_step = step


def carry(arguments: list[str], source: str, to: str, convert: bool = False, beside: str | None = None) -> Any:
    from toolkit.checkpoint.export import moved
    from toolkit.checkpoint.store import Store
    from toolkit.checkpoint.universal import open_checkpoint
    from toolkit.commands.checkpoint import find
    from toolkit.run.saving import Saver
    from toolkit.state.sharding import reshard
    from toolkit.zero.checkpoint import load, sharding

    _, engine = _engine(arguments)
    found = open_checkpoint(find(Path(source)))
    moved(found, None if beside is None else Path(beside))
    held = sharding(engine)
    assert reshard(held, stage=held.stage, world_size=held.world_size) == held, "what is computed offline is what is"
    try:
        said = load(engine, found, convert=convert)
    except UserError as error:
        return str(error)
    saver = Saver(engine, Store(Path(to)))
    saver.now(found.manifest.step, {key: value for key, value in found.manifest.facts.items() if key == "identity"})
    saver.close()
    return said


def _engine(arguments: list[str]) -> Any:
    from toolkit.run.prepare import prepare

    settings = parse(arguments)
    assert settings is not None
    ranks.start()
    prepared = prepare(settings)
    return prepared, training.build_engine(prepared)


def stock(arguments: list[str], to: str) -> None:
    from toolkit import data

    prepared, engine = _engine(arguments)
    batches = data.rank_batches(
        prepared.data, rank=ranks.rank(), world_size=ranks.world_size(), micro_batch=prepared.batch.micro
    )
    for _ in range(3):
        training.optimizer_step(engine, batches, prepared.batch.accumulation)
    batches.close()
    engine.save_checkpoint(to)


def universal(arguments: list[str], source: str, tag: str) -> Any:
    _, engine = _engine(arguments)
    engine.load_checkpoint(source, tag=tag)
    found = {}
    for name, param in engine.module.named_parameters():
        mapping = param._hp_mapping
        if mapping is not None:
            found[name] = {
                "start": mapping.lp_fragment_address.start,
                "fp32": mapping.get_hp_fragment().clone(),
                **{key: mapping.get_optim_state_fragment(key).clone() for key in ("exp_avg", "exp_avg_sq")},
            }
    return found


KINDS: dict[str, Callable[..., Any]] = {"run": run, "carry": carry, "stock": stock, "universal": universal}


def main() -> None:
    ranks.prepare_environment()
    from deepspeed.accelerator import get_accelerator

    # Half precision computes correctly on any CPU; DeepSpeed refuses it where the hardware has no fast path.
    get_accelerator().is_fp16_supported = lambda: True
    answer(KINDS)
    ranks.finish()


if __name__ == "__main__":
    main()
