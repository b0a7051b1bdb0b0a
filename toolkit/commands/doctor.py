"""`toolkit doctor`: what this machine and this environment offer a run, and what will not work."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.errors import UserError
from toolkit.printable import echo
from toolkit.records.machine import cores
from toolkit.records.sizes import counted


@dataclass
class Findings:
    """What was found, by what it is about, and the sentences about what will not work."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    parity: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Instead: train a preset, or a folder's model, in different ways and compare; takes minutes.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="With --parity: text to train on, as for a run. (default: stdlib)")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=2, help="Also time an all-reduce of so many ranks of this machine; takes half a minute."),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option("--hostfile", "-H", help="Also ask the machines of it, by ssh: clocks, installed versions."),
    ] = None,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Remove what killed runs of yours left: build locks, files in shared memory."),
    ] = False,
) -> None:
    """Show what this machine offers a run, and what will not work; exit status 1 where something will not.

    \b
    toolkit doctor
    toolkit doctor --fix
    toolkit doctor --ranks 2
    toolkit doctor --hostfile hosts
    toolkit doctor --parity qwen3-tiny
    """
    if parity is not None:
        beside = next((name for name, given in (("ranks", ranks), ("hostfile", hostfile), ("fix", fix)) if given), None)
        if beside is not None:
            raise UserError(f"--parity trains a model instead of looking at this machine; give --{beside} by itself.")
        _parity(parity, "stdlib" if data is None else data, as_json)
        return
    if data is not None:
        raise UserError("--data is what --parity MODEL trains on; without that nothing is trained.")
    from toolkit.console import waiting
    from toolkit.run import hosts, leftovers
    from toolkit.run.ranks import check_room

    check_room(ranks or 1)
    names = list(hosts.read_hostfile(hostfile)) if hostfile is not None else []
    gone = leftovers.removed() if fix else []
    with waiting("looking at this machine"):
        found = examine()
    if fix:
        found.facts["removed"] = [str(path) for path in gone]
    if ranks is not None:
        with waiting(f"timing an all-reduce of {counted(ranks, 'rank')}"):
            _reach(found, ranks)
    if names:
        with waiting(f"asking {counted(len(names), 'machine')}"):
            _hosts(found, names)
    if as_json:
        typer.echo(json.dumps({"facts": found.facts, "problems": found.problems}, indent=1))
    else:
        width = max(map(len, found.facts))
        for name, value in found.facts.items():
            echo(f"{name:{width}}  {', '.join(value) or 'none' if isinstance(value, list) else value}")
        if "left by killed runs" in found.facts:
            echo("toolkit doctor --fix removes what killed runs left")
        for problem in found.problems or ["no problem found"]:
            echo(f"problem: {problem}" if found.problems else problem)
    if found.problems:
        raise typer.Exit(1)


def _parity(model: str, data: str, as_json: bool) -> None:
    """Compare ZeRO stages, one rank and two, one micro-batch and several, on `model`."""
    import dataclasses
    import tempfile

    from rich.table import Table

    from toolkit import models
    from toolkit.compare.parity import LOSS, SEQ_LEN, SEQUENCES, STEPS, WAYS, WEIGHTS, parity
    from toolkit.console import PlainConsole
    from toolkit.data.stream import check_source

    check_source(data)
    models.check_length(models.load_config(model)[0], model, SEQ_LEN)
    with tempfile.TemporaryDirectory(prefix="leanstate-parity-") as folder:
        found = parity(model, data, Path(folder), lambda line: typer.echo(line, err=True))
    differ = [one for one in found if not one.agrees]
    if as_json:
        compared = [dataclasses.asdict(one) | {"agrees": one.agrees} for one in found]
        typer.echo(json.dumps({"loss_tolerance": LOSS, "weights_tolerance": WEIGHTS, "compared": compared}, indent=1))
    else:
        table = Table("stage", "ranks", "micro-batches", "", "loss", "weights", box=None)
        table.add_column("most at", overflow="fold")
        for one in found:
            way = (str(one.way.stage), str(one.way.ranks), str(one.way.accumulation))
            how = "agrees" if one.agrees else "DIFFERS"
            table.add_row(*way, how, f"{one.loss:.1e}", f"{one.weights:.1e}", one.parameter)
        console = PlainConsole()
        console.print_line(
            f"{model}: {STEPS} steps of {SEQUENCES} sequences, fp32, against {WAYS[0]}; relative differences of losses "
            f"(tolerance {LOSS:g}) and of each parameter's change ({WEIGHTS:g})"
        )
        console.print(table)
        same = "all ways agree" if not differ else f"{len(differ)} of {len(found)} ways differ"
        console.print_line(f"{same} within the tolerance")
    if differ:
        raise typer.Exit(1)


def examine() -> Findings:
    """Look at this machine; starts no rank and changes no file."""
    from toolkit.run import ranks
    from toolkit.run.folder import versions

    ranks.prepare_environment()
    found = Findings()
    known = versions()
    found.facts["versions"] = [f"{name} {version}" for name, version in known.items()]
    found.problems += [f"{name} is not installed." for name, version in known.items() if version == "not installed"]
    if "torch" in known and known["torch"] != "not installed":
        _processor(found)
        _gpus(found)
        _memory(found)
        _compiler(found)
        _deepspeed(found)
    return found


def _reach(found: Findings, count: int) -> None:
    from toolkit.records.sizes import size_text
    from toolkit.run.reach import BYTES, all_reduce, bus_bytes

    try:
        seconds, backend = all_reduce(count)
    except UserError as error:
        found.problems.append(str(error))
        return
    rate = size_text(int(bus_bytes(seconds, count)))
    found.facts["all-reduce"] = (
        f"{size_text(BYTES)} in {1000 * seconds:.1f} ms, {counted(count, 'rank')}, {backend}: {rate}/s a rank"
    )


def _hosts(found: Findings, names: list[str]) -> None:
    from toolkit.run import hosts
    from toolkit.run.folder import versions

    answered = hosts.ask(names)
    for host in answered:
        if host.versions is not None:
            found.facts[host.name] = f"answers; its clock is {host.ahead_seconds:+.2f} s from this machine's"
    found.problems += hosts.problems(answered, versions())


def _processor(found: Findings) -> None:
    import torch

    from toolkit.models.cpu_matmul import VARIABLE, computes_in_fp32

    capability = torch.backends.cpu.get_cpu_capability()
    found.facts["CPU"] = f"{cores()} cores, {capability}"
    try:
        slow = computes_in_fp32()
    except UserError as error:
        found.problems.append(f"{error}")
    else:
        forced = f" ({VARIABLE} says so)" if os.environ.get(VARIABLE, "auto") != "auto" else ""
        how = "computed in fp32, native ones are slow" if slow else "native"
        found.facts["bf16 products"] = f"on the CPU: {how}{forced}"


def _gpus(found: Findings) -> None:
    import torch

    from toolkit.records.sizes import size_text

    gpus = []
    if torch.cuda.is_available():
        devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        gpus = [f"{device.name} with {size_text(device.total_memory)}" for device in devices]
        found.facts["GPU to GPU"] = _peers(len(gpus))
    elif Path("/proc/driver/nvidia/version").exists():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        found.problems.append(f"this machine has an NVIDIA driver, but torch, which was built {built}, finds no GPU.")
    found.facts["GPUs"] = gpus
    found.facts["collectives"] = _collectives()


def _peers(count: int) -> str:
    """Whether GPUs of this machine read one another's memory: by NVLink or PCIe, and not by way of the host."""
    import torch

    pairs = [(a, b) for a in range(count) for b in range(count) if a < b]
    direct = [pair for pair in pairs if torch.cuda.can_device_access_peer(*pair)]
    apart = ", ".join(f"{a} and {b}" for a, b in pairs if (a, b) not in direct)
    if not pairs:
        return "one GPU"
    return "all pairs directly" if not apart else f"by way of the host: {apart}"


def _collectives() -> list[str]:
    import torch
    from torch import distributed

    if not distributed.is_available():
        return []
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if distributed.is_nccl_available() else None
    return [*([f"NCCL {nccl}"] if nccl else []), *(["gloo"] if distributed.is_gloo_available() else [])]


def _memory(found: Findings) -> None:
    import torch

    from toolkit.memory.machine import unused
    from toolkit.memory.watermarks import limits
    from toolkit.records.sizes import size_text
    from toolkit.run.leftovers import left_in_shared_memory, little_shared_memory

    what, most = min(limits(torch.device("cpu")).items(), key=lambda limit: limit[1])
    found.facts["memory"] = f"{size_text(most)} ({what}), {size_text(min(unused(), most))} available"
    try:
        shared = os.statvfs("/dev/shm")
    except OSError as error:
        found.facts["/dev/shm"] = "none"
        found.problems.append(f"/dev/shm cannot be used ({error.strerror}): ranks of one machine exchange data there.")
        return
    size, free = (count * shared.f_frsize for count in (shared.f_blocks, shared.f_bavail))
    found.facts["/dev/shm"] = f"{size_text(size)}, {size_text(free)} free"
    if left := left_in_shared_memory():
        found.facts["left by killed runs"] = [str(path) for path in left]
    if (little := little_shared_memory()) is not None:
        found.problems.append(f"{little}: ranks of one machine may fail to reach one another.")


def _compiler(found: Findings) -> None:
    import shutil

    from torch._inductor.cpp_builder import get_cpp_compiler

    from toolkit.run.leftovers import find_locks

    try:
        found.facts["C++ compiler"] = get_cpp_compiler()
    except Exception:  # torch's own classes, which have moved between versions
        found.facts["C++ compiler"] = "none"
        found.problems.append(
            "there is no C++ compiler, which the compiled optimizer step needs; install g++, name one in CXX, or set "
            "optimizer.params.compile=false."
        )
    ninja = shutil.which("ninja")
    found.facts["ninja"] = ninja or "none"
    if ninja is None:
        found.problems.append("there is no ninja, which builds DeepSpeed's extensions; install the package ninja.")
    found.facts["build locks"] = [str(lock) for lock in find_locks()]


def _deepspeed(found: Findings) -> None:
    from toolkit.run import ranks

    ranks.settle_accelerator()
    try:
        from deepspeed.accelerator import get_accelerator

        from toolkit.zero.compatibility import incompatibilities

        found.facts["accelerator"] = get_accelerator().device_name()
        missing = incompatibilities()
    except Exception as error:  # whatever an import may raise in an environment that does not fit
        found.problems.append(f"DeepSpeed cannot be used: {type(error).__name__}: {error}".splitlines()[0])
        return
    found.facts["DeepSpeed fits"] = "no" if missing else "yes"
    if missing:
        found.problems.append(f"this DeepSpeed lacks what leanstate relies on: {', '.join(missing)}.")
