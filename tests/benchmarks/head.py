"""The chunked loss beside the plain one and torch's own (2.13): error of the gradients, and time of both passes.

    python tests/benchmarks/head.py [--tokens 2048] [--hidden 768] [--vocab 32000] [--threads 1]

Operands are bf16; the error is the norm of the difference over the norm, against whole logits in float64 from the same
operands. On a CPU the time is processor time, the least of three; on a GPU it is that of the device.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.models.loss import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways() -> dict[str, Loss]:
    """Each takes hidden, weight and targets."""
    found: dict[str, Loss] = {
        "chunked": linear_cross_entropy,
        "plain": lambda hidden, weight, targets: F.cross_entropy(F.linear(hidden, weight).float(), targets),
    }
    torchs_own = getattr(F, "linear_cross_entropy", None)
    if torchs_own is not None:
        # Without options torch builds the full logits. Its choice for CPUs, a few dozen tokens, takes twice the time.
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=None if torch.cuda.is_available() else 256)
        each = functools.partial(torchs_own, reduction="none", options=options)
        found["torch's, in chunks"] = lambda hidden, weight, targets: each(hidden, weight, targets).float().mean()
    return found


def passes(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[list[Tensor], float]:
    """The gradients of hidden and weight, and the seconds that both passes take."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    if hidden.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    started = time.process_time()
    loss(*leaves, targets).backward()
    seconds = time.process_time() - started
    if hidden.is_cuda:
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
    return [x.grad for x in leaves if x.grad is not None], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("hidden", 768), ("vocab", 32_000), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weight = torch.randn(options.vocab, options.hidden) * 0.05
    targets = torch.randint(0, options.vocab, (options.tokens,))
    hidden = torch.randn(options.tokens, options.hidden) + 10 * torch.rand(options.tokens, 1) * weight[targets]
    given = [x.bfloat16().to(device) for x in (hidden, weight)]
    targets = targets.to(device)
    exact, _ = passes(lambda h, w, t: F.cross_entropy(F.linear(h, w), t), *(x.double() for x in given), targets)
    print(f"{device}, {options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocab}\n")
    print("| loss | error, hidden's gradient | error, weight's gradient | ms |\n|---|---|---|---|")
    for name, loss in ways().items():
        found, _ = passes(loss, *given, targets)
        seconds = min(passes(loss, *given, targets)[1] for _ in range(3))
        errors = [float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]
        print(f"| {name} | {errors[0]:.2%} | {errors[1]:.2%} | {1e3 * seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
