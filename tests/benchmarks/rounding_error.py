"""bf16 weights after some steps: how far they are from fp32 weights, by what becomes of the bits that rounding drops.

    python tests/benchmarks/rounding_error.py [--hidden 64] [--steps 60] [--lr 1e-3]

The small Qwen3 of `codec_error.py` trains with Adam and fp32 weights (betas 0.9 and 0.95, no decay, one rate). Every
candidate takes the same gradients and keeps matrices of its own: their distance from the fp32 ones is given over the
distance that these have moved, in %. So nothing is said of how a model makes up for an error later.

Error feedback (Nikdan et al. 2026, "ECO") keeps no bits. What rounding has taken from a weight, e, goes into its
momentum, with c = 1 - b1^t and d = sqrt(v / (1 - b2^t)) + eps:

    m <- m + (1 - 1 / b1) e c d / lr

whose share in all later updates, - lr m / (c d) and b1 of it in each step, adds up to e.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, field

import torch
from codec_error import small_model
from torch import Tensor

from toolkit.state.codecs import BLOCK, Root, Signed, decode_blocks, encode_blocks
from toolkit.state.remainders import Remainder, rounding_phase, thresholds

B1, B2, EPS = 0.9, 0.95, 1e-8
WAYS = {
    "`bf16+8`": (8, False, False),
    "`bf16+4`": (4, False, False),
    "`bf16`: rounded stochastically": (0, False, False),
    "rounded stochastically, error feedback": (0, False, True),
    "rounded to the nearest, error feedback": (0, True, True),
    "rounded to the nearest": (0, True, False),
}
"""Bits of remainder, whether to the nearest, whether with error feedback."""


@dataclass
class Weights:
    """The matrices of one candidate, as blocks; `coded`: state in 8 bits."""

    bits: int
    nearest: bool
    feedback: bool
    coded: bool
    lr: float
    stored: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    state: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def theta(self, name: str) -> Tensor:
        return Remainder(self.bits).join(*self.stored[name]) if self.bits < 16 else self.stored[name][0]

    def step(self, name: str, g: Tensor, t: int, first: int) -> None:
        m, v = self.state[name]
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        c, d = 1 - B1**t, (v / (1 - B2**t)).sqrt() + EPS
        theta = self.theta(name) - self.lr * m / (c * d)
        if self.bits == 16:
            self.stored[name] = (theta,)
        else:
            phase = torch.tensor(float(rounding_phase(0, t, first)))
            threshold = None if self.nearest else thresholds(phase, theta.shape[0], 0, BLOCK)
            self.stored[name] = Remainder(self.bits).split(theta, threshold)
        if self.feedback:
            m = m + (1 - 1 / B1) * (theta - self.theta(name)) * c * d / self.lr
        if self.coded:
            m, v = (decode_blocks(one, *encode_blocks(one, x)) for one, x in ((Signed(8), m), (Root(8), v)))
        self.state[name] = (m, v)


def begin(weights: Weights, name: str, theta: Tensor) -> None:
    weights.state[name] = (torch.zeros_like(theta), torch.zeros_like(theta))
    weights.stored[name] = Remainder(weights.bits).split(theta) if weights.bits < 16 else (theta,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    model, batches = small_model(options.hidden)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    exact = Weights(16, True, False, False, options.lr)
    kept = {
        (name, coded): Weights(bits, nearest, feedback, coded, options.lr)
        for (name, (bits, nearest, feedback)), coded in itertools.product(WAYS.items(), (False, True))
    }
    start = {}
    for name, p in matrices.items():
        p.data.copy_(p.data.bfloat16())
        start[name] = p.detach().clone().view(-1, BLOCK)
        for one in (exact, *kept.values()):
            begin(one, name, start[name].clone())
    for t in range(1, options.steps + 1):
        tokens = next(batches)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            first = 0
            for name, p in matrices.items():
                for one in (exact, *kept.values()):
                    one.step(name, p.grad.view(-1, BLOCK), t, first)
                first += p.numel() // BLOCK
                p.copy_(exact.theta(name).view_as(p))
        model.zero_grad()

    def apart(one: dict[str, Tensor]) -> float:
        return sum((one[name] - exact.theta(name)).square().sum().item() for name in matrices) ** 0.5

    moved = apart(start)
    print("| | bytes a parameter beside the bf16 weight | state in fp32 | state in 8 bits |\n|---|---|---|---|")
    for name, (bits, *_) in WAYS.items():
        errors = [apart({key: kept[name, coded].theta(key) for key in matrices}) for coded in (False, True)]
        print(f"| {name} | {bits / 8:g} | " + " | ".join(f"{100 * error / moved:.2f}" for error in errors) + " |")


if __name__ == "__main__":
    main()
