"""The error that 8-bit state puts into AMCS's update, by tensor, for several codes of the same size.

    python tests/benchmarks/codec_error.py [--hidden 128] [--steps 60]

Trains a small Qwen3 on the standard library's source with fp32 state. Every candidate code sees the same
gradients and keeps its own coded state; after the last step its update is set against the exact one: the norm of
the difference over the norm. "signed p, v q" means: momentum coded as a p-th root, second moment as a q-th root.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from toolkit.data import PackedTokens, load_tokenizer, open_documents
from toolkit.optim import AMCS, AMCSRule, param_groups
from toolkit.state.codecs import BLOCK, Root8, Signed8

CANDIDATES = [(1, 2), (1, 4), (2, 2), (2, 3), (2, 4), (3, 4)]
ROWS, SEQ_LEN = 8, 32


def power_code(x: Tensor, root: float, largest: int, smallest: int) -> Tensor:
    """`x` [blocks, BLOCK] coded and decoded with `largest` codes of its `root`-th root, none below `smallest`."""
    scale = x.abs().amax(dim=1, keepdim=True)
    y = (x.abs() / scale.clamp(min=1e-38)) ** (1 / root)
    codes = (y * largest).round().clamp(min=smallest)
    return x.sign() * (codes / largest) ** root * scale


def coded(states: list[Tensor], candidate: tuple[float, float] | str) -> list[Tensor]:
    """The three states of AMCS as `candidate` gives them back."""
    if candidate == "exact":
        return states
    *momenta, v = states
    if candidate == "shipped":
        return [*(Signed8.decode(*Signed8.encode(m)) for m in momenta), Root8.decode(*Root8.encode(v))]
    signed, root = candidate
    return [*(power_code(m, float(signed), 127, 0) for m in momenta), power_code(v, float(root), 255, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)
    hidden = options.hidden
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    documents, tokenizer = open_documents("stdlib"), load_tokenizer("python-4k")
    sequences = PackedTokens(documents, tokenizer, SEQ_LEN, seed=0, shuffle_window=256).sequences()
    rule = AMCSRule(lr=1e-3, total_steps=options.steps)
    optimizer = AMCS(param_groups(model), lr=1e-3, total_steps=options.steps, state_format="fp32")
    candidates = ["exact", "shipped", *CANDIDATES]
    held: dict[tuple[str, object], list[Tensor]] = {}
    updates: dict[tuple[str, object], Tensor] = {}
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    for t in range(1, options.steps + 1):
        tokens = torch.stack([torch.as_tensor(next(sequences)) for _ in range(ROWS)])
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scalars = {key: torch.tensor(value) for key, value in rule.scalars(t).items()}
        for name, p in matrices.items():
            assert p.grad is not None
            g = torch.nn.functional.pad(p.grad.flatten(), (0, -p.numel() % BLOCK)).view(-1, BLOCK)
            for candidate in candidates:
                states = held.get((name, candidate)) or [torch.zeros_like(g)] * 3
                update, *states = rule.update(torch.zeros_like(g), g, *states, **scalars)
                updates[name, candidate] = update
                held[name, candidate] = coded(states, candidate)
        optimizer.step()
        optimizer.zero_grad()
    titles = [c if isinstance(c, str) else f"signed {c[0]}, v {c[1]}" for c in candidates[1:]]
    print(f"{'update error in %':42}" + "".join(f"{title:>16}" for title in titles))
    total = dict.fromkeys(candidates, 0.0)
    for name in matrices:
        exact = updates[name, "exact"]
        errors = [(updates[name, c] - exact).norm().item() for c in candidates[1:]]
        for c, error in zip(candidates[1:], errors, strict=True):
            total[c] += error**2
        total["exact"] += exact.norm().item() ** 2
        print(f"{name:42}" + "".join(f"{100 * error / exact.norm().item():16.2f}" for error in errors))
    print(f"{'all':42}" + "".join(f"{100 * (total[c] / total['exact']) ** 0.5:16.2f}" for c in candidates[1:]))


if __name__ == "__main__":
    main()
