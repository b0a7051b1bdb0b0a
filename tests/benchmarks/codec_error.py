"""The error that coded state puts into AMCS's update, by kind of tensor, for the shipped formats and for other codes.

    python tests/benchmarks/codec_error.py [--hidden 128] [--steps 60] [--alpha 0.7]

Trains a small Qwen3 on the standard library's source with fp32 state. Every candidate sees the same gradients and
keeps its own coded state; after the last step its update is set against the exact one: the norm of the difference
over the norm. alpha is constant, so that both momenta count. Formats are named as in `state_format`; the others are
one of them but for what is said.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from toolkit.data import PackedTokens, load_tokenizer, open_documents
from toolkit.optim import AMCS, AMCSRule, component_of, param_groups
from toolkit.state.codecs import BLOCK, Codec, Root, Scale, Signed, decode_blocks, encode_blocks
from toolkit.state.layout import layout, state_formats

KINDS = ("embedding", "head", "attention", "ffn", "all")
ROWS, SEQ_LEN = 8, 32


class Linear(Signed):
    """Momentum in linear codes, right on average: code = 127 x / max|x|, or in 4 bits code = 7 x / max|x| + 8."""

    def encode(self, x: Tensor, scale: Scale, dither: Tensor) -> Tensor:
        zero = 8.0 if self.bits == 4 else 0.0
        return torch.floor(self.largest * (x * scale.inverse) + dither + zero).to(self.dtype)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        zero = 8.0 if self.bits == 4 else 0.0
        return (codes.float() - zero) / self.largest * scale


class SquareRoot(Root):
    """v as a square root: `Root`, which takes the fourth, of its square."""

    def scale_of(self, largest: Tensor) -> Tensor:
        return largest.sqrt()

    def encode(self, x: Tensor, scale: Scale, dither: Tensor) -> Tensor:
        return super().encode(x * x, scale, dither)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return super().decode(codes, scale).sqrt()


RESIDUAL = Signed(4, relative=True)


def shipped(name: str) -> tuple[Codec, ...]:
    return layout(AMCSRule.states, state_formats(AMCSRule.states, name, where="here"), "fp32", torch.float32).codecs


CANDIDATES: dict[str, tuple[Codec, ...]] = {
    "exact": shipped("fp32"),
    **{name: shipped(name) for name in ("8bit", "compact", "minimal", "4bit")},
    "8bit, momenta linear": (Linear(8), Linear(8), Root(8)),
    "8bit, v as square root": (Signed(8), Signed(8), SquareRoot(8)),
    "compact, m_fast linear": (Linear(4, relative=True), Signed(8), Root(8)),
    "compact, m_fast without m_slow": (Signed(4), Signed(8), Root(8)),
    "compact, without it and linear": (Linear(4), Signed(8), Root(8)),
    "minimal, v as square root": (RESIDUAL, Signed(8), SquareRoot(4)),
    "8bit, v 4 bits": (Signed(8), Signed(8), Root(4)),
}
"""Codecs of m_fast, m_slow and v."""


def coded(states: list[Tensor], codecs: tuple[Codec, ...]) -> list[Tensor]:
    """The states of AMCS as `codecs` give them back."""
    fast, slow, v = states
    base = slow if codecs[0].relative else 0.0
    residual, slow, v = (
        decode_blocks(codec, *encode_blocks(codec, x)) for codec, x in zip(codecs, (fast - base, slow, v), strict=True)
    )
    return [residual + slow if codecs[0].relative else residual, slow, v]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--alpha", type=float, default=0.7)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = {"vocab_size": 4096, "hidden_size": options.hidden, "intermediate_size": 2 * options.hidden}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": options.hidden // 4}
    model = Qwen3ForCausalLM(
        Qwen3Config(**shape, **heads, num_hidden_layers=2, tie_word_embeddings=False, use_cache=False)
    )
    documents, tokenizer = open_documents("stdlib"), load_tokenizer("python-4k")
    sequences = PackedTokens(documents, tokenizer, SEQ_LEN, seed=0, shuffle_window=256).sequences()
    rule = AMCSRule(lr=1e-3, alpha=options.alpha)
    optimizer = AMCS(param_groups(model), lr=1e-3, alpha=options.alpha, state_format="fp32")
    modules = dict(model.named_modules())
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    held: dict[tuple[str, str], list[Tensor]] = {}
    squares = {candidate: dict.fromkeys(KINDS, 0.0) for candidate in CANDIDATES}
    for t in range(1, options.steps + 1):
        tokens = torch.stack([torch.as_tensor(next(sequences)) for _ in range(ROWS)])
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scalars = {key: torch.tensor(value) for key, value in rule.scalars(t).items()}
        for name, p in matrices.items():
            assert p.grad is not None
            g = torch.nn.functional.pad(p.grad.flatten(), (0, -p.numel() % BLOCK)).view(-1, BLOCK)
            exact = torch.zeros_like(g)
            for candidate, codecs in CANDIDATES.items():
                states = held.get((name, candidate)) or [torch.zeros_like(g)] * 3
                update, *states = rule.update(torch.zeros_like(g), g, *states, **scalars)
                held[name, candidate] = coded(states, codecs)
                exact = update if candidate == "exact" else exact
                if t == options.steps:
                    apart = update if candidate == "exact" else update - exact
                    for kind in (component_of(name, modules), "all"):
                        squares[candidate][kind] += apart.square().sum().item()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{'update error in %':32}{'bytes':>8}" + "".join(f"{kind:>11}" for kind in KINDS))
    for candidate, codecs in list(CANDIDATES.items())[1:]:
        errors = [(squares[candidate][kind] / squares["exact"][kind]) ** 0.5 for kind in KINDS]
        size = sum(codec.bytes_per_element() for codec in codecs)
        print(f"{candidate:32}{size:8.2f}" + "".join(f"{100 * error:11.2f}" for error in errors))


if __name__ == "__main__":
    main()
