"""Whether a run gives the same bits twice, and after it was resumed, with and without `--deterministic`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from measuring.record import Recorder
from measuring.runs import metrics, start

STEPS, HALF = 12, 6
KEYS = ("loss", "grad_norm", "lr")
FLAG = "--deterministic"
UNSEEDED = ".random.numpy."


def measure(recorder: Recorder) -> None:
    model, rows, length = ("qwen3-tiny", 2, 32) if recorder.rehearse else ("qwen3-134m", 8, 256)
    arguments = ["--model", model, "--steps", str(STEPS), "--micro-batch", str(rows), "--seq-len", str(length)]
    arguments += ["--save-every", str(HALF), "--memory-profile", "off"]
    ways = {FLAG: [*arguments, FLAG], "without": arguments}
    # All at once: starting takes longer than the steps, and how the GPU shares its time changes no bit.
    begun = {
        (way, run): start(recorder.folder / way / run, *given) for way, given in ways.items() for run in ("one", "two")
    }
    ended = {key: process.wait() for key, process in begun.items()}
    good = [way for way in ways if not ended[way, "one"] and not ended[way, "two"]]
    for way in ways.keys() - set(good):
        recorder.note(f"{way}: a run ended with status {ended[way, 'one'] or ended[way, 'two']}.")
    again = {}
    for way in good:
        checkpoint = recorder.folder / way / "one" / "checkpoints" / f"global_step{HALF}"
        again[way] = start(recorder.folder / way / "resumed", *ways[way], "--resume", str(checkpoint))
    for way, process in again.items():
        status = process.wait()
        suffix = "" if way == FLAG else "_without"
        one, two, resumed = (recorder.folder / way / run for run in ("one", "two", "resumed"))
        count, different = compare(one, two)
        recorder.set(**{f"twice_differ{suffix}": len(different)}, compared=count)
        if different:
            recorder.note(f"{way}, twice: {', '.join(different[:5])}.")
        if status:
            recorder.note(f"{way}: the resumed run ended with status {status}.")
            continue
        _, different = compare(one, resumed)
        recorder.set(**{f"resumed_differ{suffix}": len(different)})
        if different:
            recorder.note(f"{way}, resumed: {', '.join(different[:5])}.")


def compare(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many figures and tensors were compared and which differ: of the second half, and of the last checkpoint."""
    different = []
    count = 0
    mine, theirs = ({record["step"]: record for record in metrics(run)} for run in (one, other))
    for step in range(HALF + 1, STEPS + 1):
        for key in KEYS:
            count += 1
            if mine[step][key] != theirs[step][key]:
                different.append(f"{key} of step {step}")
    held, same = (dict(tensors(run / "checkpoints" / f"global_step{STEPS}")) for run in (one, other))
    for name in held.keys() | same.keys():
        count += 1
        if name not in held or name not in same or not torch.equal(held[name], same[name]):
            different.append(name)
    return count, sorted(different)


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint, by file and place in it; not the state of numpy's generator, which nobody seeds."""
    for file in sorted(folder.rglob("*.pt")):
        for place, tensor in within(torch.load(file, map_location="cpu", weights_only=False), file.name):
            if UNSEEDED not in place:
                yield place, tensor


def within(value: Any, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from within(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from within(item, f"{place}.{index}")
