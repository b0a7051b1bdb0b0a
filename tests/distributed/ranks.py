"""Starts ranks, by themselves or through the real `deepspeed` launcher, and collects what they wrote."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fork_server import ForkServer

SERVER = ForkServer()
WORKER = Path(__file__).with_name("worker.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launched(
    folder: Path, world_size: int, script: Path | str, *arguments: str, more: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """`deepspeed --num_gpus <world_size> script arguments`: its exit status and all that it and its ranks printed."""
    command = deepspeed_command(world_size, script, *arguments)
    folder.mkdir(parents=True, exist_ok=True)
    found = SERVER.call(command, environment() | dict(more or {}), folder / "launched.log", launches=True)
    remove_buffers(command[command.index("--master_port") + 1])
    return found


def deepspeed_command(world_size: int, script: Path | str, *arguments: str) -> list[str]:
    return [*deepspeed_launcher(), "--num_gpus", str(world_size), str(script), *arguments]


def toolkit_command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from toolkit.cli import main; main()", *arguments]


def deepspeed_launcher() -> list[str]:
    launcher = Path(sys.executable).with_name("deepspeed")
    return [sys.executable, str(launcher), "--master_port", str(free_port())]


def remove_buffers(port: str) -> None:
    """Remove what DeepSpeed leaves in shared memory where `ranks.start` is not called: 69 MB a rank."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink()


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def case(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """One training of the worker.

    `same_data`: every rank sees the whole global batch. `save_at`: after so many steps DeepSpeed saves a
    checkpoint, and a fresh model with other weights resumes from it. `poison_at`: gradients of that step are NaN.
    `unused`: the model gets a parameter that no loss depends on. `full`: the fp32 weights come back, too. `loss`:
    "chunked" or "plain" of a model with tied embeddings that keeps `activations`, instead of transformers' own.
    `products`: how bf16 matrices are multiplied (`toolkit.models.cpu_matmul`). `recompute`: activation checkpointing.
    `layers`: of the model; one has all that most cases ask for, and takes half the time of two.
    """
    return {
        "steps": 4,
        "global_batch": 4,
        "same_data": False,
        "dump": False,
        "save_at": None,
        "poison_at": None,
        "unused": False,
        "full": False,
        "products": "auto",
        "recompute": False,
        "layers": 1,
        "loss": None,
        "activations": "checkpoint",
        "config": config,
    } | settings


def launch(folder: Path, world_size: int, script: Path, settings: dict[str, Any]) -> list[Any]:
    """Run `script` in `world_size` real processes; what each wrote to rank<n>.pt in `folder`, in rank order.

    The script's only argument is the path of a JSON of `settings`, whose key `out` is `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings | {"out": str(folder)}))
    port, size, log = str(free_port()), str(world_size), folder / "log"
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_SIZE": size}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    environments = [environment() | common | one for one in own]
    ended = SERVER.run(script, [str(folder / "settings.json")], environments, log, timeout=500)
    remove_buffers(port)
    assert ended, log.read_text()[-10_000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


def answer(kinds: Mapping[str, Callable[..., Any]]) -> None:
    """In a rank that `launch` started: do each of its settings' `steps`, which one of `kinds` names; write the results.

    A step's other keys are arguments of what does it.
    """
    settings = json.loads(Path(sys.argv[-1]).read_text())
    results = []
    for step in settings["steps"]:
        kind = next(name for name in kinds if name in step)
        results.append(kinds[kind](step.pop(kind), **step))
    torch.save(results, Path(settings["out"]) / f"rank{os.environ['RANK']}.pt")


def serve(kinds: Mapping[str, Callable[..., Any]]) -> None:
    """`answer`, as all that a worker does: start the rank, and end it."""
    from toolkit.run import ranks

    ranks.prepare_environment()
    ranks.start()
    answer(kinds)
    ranks.finish()


def run_ranks(
    folder: Path, world_size: int, cases: dict[str, dict[str, Any]], plugins: list[Path] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Train every case in `world_size` ranks of the worker; by case, what each rank wrote, in rank order."""
    settings = {"cases": cases, "plugins": [str(p) for p in plugins or []]}
    ranks = launch(folder, world_size, WORKER, settings)
    return {name: [rank[name] for rank in ranks] for name in cases}
