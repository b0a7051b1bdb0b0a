"""Steps on the GPU against steps on the CPU, gradients in pieces, and a tensor that needs 64-bit indices."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from measuring.parts import FORMATS, RULES, WEIGHTS
from measuring.record import Recorder

STEPS = 10
SHAPE = (509, 1031)  # no whole number of blocks
PIECES = (1, 255, 256, 257, 65_535, 65_537, 200_000)
TWIN = 2**24
"""Elements after which the stochastic rounding of weights repeats: 2^16 blocks."""
COPIES = 128
TAIL = 512
WORKERS = 12


def optimizer_of(rule: str, parameters: list[nn.Parameter], **settings: Any) -> Any:
    from toolkit.optim import AMCS, SOAM

    if rule == "SOAM":
        return SOAM(parameters, **settings)
    return AMCS(parameters, total_steps=2 * STEPS, mode="single" if rule == "AMCS single" else "dual", **settings)


def measure(recorder: Recorder) -> None:
    cases = list(itertools.product(RULES, FORMATS, WEIGHTS))
    if recorder.rehearse:
        cases = [("AMCS", "compact", "bf16+4"), ("SOAM", "8bit", "fp32")]
    # Most of the time is compilation, which several processes share.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    workers = min(WORKERS, len(cases), max(1, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(compare, *case, recorder.device): case for case in cases}
        twin_differs(recorder)
        keep(recorder, running)


def keep(recorder: Recorder, running: dict[Future[Comparison], tuple[str, str, str]]) -> None:
    """Write the comparisons down as they come."""
    worst = {"compiled_equal": 100.0, "eager_equal": 100.0}
    pieces = fell_back = count = 0
    for future in as_completed(running):
        rule, name, weights = running[future]
        try:
            found = future.result()
        except Exception as error:
            recorder.note(f"{rule} {name}, {weights}: {type(error).__name__}: {str(error)[:200]}")
            continue
        recorder.row("compiled", f"{rule} {name}", **{weights: found.compiled})
        recorder.row("moved", f"{rule} {name}", **{weights: found.moved})
        worst["compiled_equal"] = min(worst["compiled_equal"], found.compiled)
        worst["eager_equal"] = min(worst["eager_equal"], found.eager)
        count, fell_back = count + 1, fell_back + (found.reason is not None)
        pieces += bool(found.pieces)
        if found.pieces:
            recorder.note(f"{rule} {name}, {weights}: in pieces other bits in {', '.join(found.pieces)}.")
        if found.reason is not None:
            recorder.note(f"{rule} {name}, {weights}: not compiled, because {found.reason}")
        recorder.set(**worst, cases=count, pieces_differ=pieces, fell_back=fell_back)


@dataclass
class Comparison:
    """Of one case: shares of equal codes and the error of the movement, in %, and what differs in pieces."""

    compiled: float
    eager: float
    moved: float
    pieces: list[str]
    reason: str | None


def compare(rule: str, state_format: str, weights: str, device: str) -> Comparison:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    settings = {"state_format": state_format, "weights": weights}
    reference = stepped(rule, dtype, "cpu", compile=False, **settings)
    compiled = stepped(rule, dtype, device, compile=True, **settings)
    eager = stepped(rule, dtype, device, compile=False, **settings)
    start = first_weights(dtype).float()
    moved = [run.weights().cpu() - start for run in (compiled, reference)]
    return Comparison(
        compiled=equal_codes(compiled, reference),
        eager=equal_codes(eager, reference),
        moved=100 * float((moved[0] - moved[1]).norm() / moved[1].norm()),
        pieces=different_in_pieces(rule, dtype, device, settings),
        reason=compiled.fallback(),
    )


@dataclass
class Run:
    """An optimizer that has stepped, and its one parameter."""

    optimizer: Any
    parameter: nn.Parameter

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.state[self.parameter]

    @property
    def layout(self) -> Any:
        return self.optimizer.layout(self.optimizer.param_groups[0], self.parameter.dtype)

    def weights(self) -> Tensor:
        """fp32, flat."""
        kept, flat = self.layout, self.parameter.detach().flatten()
        if kept.remainder is None:
            return flat
        stored = kept.remainder.unpacked(*(self.state[key] for key in kept.keys("remainder")))
        return kept.remainder.join(flat, *(part.flatten()[: flat.numel()] for part in stored))

    def fallback(self) -> str | None:
        begun = self.optimizer.begin(self.optimizer.param_groups[0], self.parameter)
        return begun.function.fallback_reason


def first_weights(dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype).flatten()


def stepped(rule: str, dtype: torch.dtype, device: str, **settings: Any) -> Run:
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(first_weights(dtype).view(SHAPE).to(device, copy=True))
    optimizer = optimizer_of(rule, [parameter], **settings)
    for _ in range(STEPS):
        parameter.grad = (torch.randn(SHAPE, generator=generator) * 1e-2).to(dtype).to(device)
        optimizer.step()
    return Run(optimizer, parameter)


def equal_codes(one: Run, other: Run) -> float:
    """% of the states' codes that are equal, each of 4 bits for itself; of fp32 state, those within a millionth.

    The remainder of weights is none of them: its last bit is that of a 32-bit number.
    """
    from toolkit.state.codecs import unpack

    equal = total = 0
    for key, spec in one.layout.specs:
        if key.startswith("remainder") or spec.suffix == "scale":
            continue
        mine, theirs = one.state[key].cpu(), other.state[key].cpu()
        if mine.is_floating_point():
            same = torch.isclose(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
        elif spec.per_block < 256:
            same = torch.cat([a == b for a, b in zip(unpack([mine]), unpack([theirs]), strict=True)])
        else:
            same = mine == theirs
        equal, total = equal + int(same.sum()), total + same.numel()
    return 100 * equal / total


def different_in_pieces(rule: str, dtype: torch.dtype, device: str, settings: dict[str, str]) -> list[str]:
    """Keys of what has other bits when the gradient comes in pieces; two steps, compiled."""
    numel = SHAPE[0] * SHAPE[1]
    results = []
    for sizes in ((numel,), (*PIECES, numel)):
        generator = torch.Generator().manual_seed(2)
        parameter = nn.Parameter(first_weights(dtype).view(1, numel).to(device, copy=True))
        optimizer = optimizer_of(rule, [parameter], **settings)
        one = torch.ones((), device=device)
        for _ in range(2):
            gradient = (torch.randn(numel, generator=generator) * 1e-2).to(dtype).to(device)
            stream, start = optimizer.begin(optimizer.param_groups[0], parameter).stream(first_block=0), 0
            for size in sizes:
                stream.add(gradient[start : start + size], one)
                start = min(start + size, numel)
                if start == numel:
                    break
            stream.finish(one)
        results.append({"weight": parameter.detach()} | optimizer.state[parameter])
    whole, pieces = results
    return [key for key in whole if not torch.equal(torch.as_tensor(whole[key]), torch.as_tensor(pieces[key]))]


def twin_differs(recorder: Recorder) -> None:
    """Two steps of a tensor of 2^31 + 512 elements, copies of its twin, on tensors that no 32-bit index reaches."""
    settings: dict[str, Any]
    size, copies, settings = TWIN, COPIES, {"weights": "bf16+8"}
    if recorder.rehearse:  # small: what is rounded to the nearest repeats everywhere
        size, copies, settings = 2**16, 3, {"weights": "bf16+16", "compile": False}
    generator = torch.Generator(recorder.device).manual_seed(3)

    def draw(scale: float) -> Tensor:
        drawn = torch.randn(size, device=recorder.device, generator=generator)
        return drawn.mul_(scale).bfloat16()

    weights, gradient = draw(1.0), draw(1e-2)
    runs = []
    for count in (1, copies):
        parameter = nn.Parameter(stretched(weights, count).view(-1, TAIL))
        parameter.grad = stretched(gradient, count).view(-1, TAIL)
        optimizer = optimizer_of("AMCS", [parameter], **settings)
        for _ in range(2):
            optimizer.step()
        runs.append(Run(optimizer, parameter))
    small, large = runs
    different = 0
    for key in ("weight", *(key for key, _ in small.layout.specs)):
        mine, theirs = ((run.parameter.detach() if key == "weight" else run.state[key]).flatten() for run in runs)
        tail = mine.numel() * TAIL // (size + TAIL)  # both end in the twin's first blocks
        body = mine[: mine.numel() - tail]
        starts = range(0, theirs.numel() - tail, body.numel())
        same = all(torch.equal(body, theirs[at : at + body.numel()]) for at in starts)
        same = same and torch.equal(mine[-tail:], theirs[-tail:])
        if not same:
            different += 1
            recorder.note(f"2^31 + 512 elements: {key} differs from its twin's.")
    recorder.set(twin_differs=different)
    reason = large.fallback()
    if reason is not None:
        recorder.note(f"2^31 + 512 elements: not compiled, because {reason}")


def stretched(twin: Tensor, copies: int) -> Tensor:
    """`copies` times `twin`, and then its first TAIL elements."""
    made = twin.new_empty(copies * twin.numel() + TAIL)
    made[:-TAIL].view(copies, -1).copy_(twin.expand(copies, -1))
    made[-TAIL:] = twin[:TAIL]
    return made
