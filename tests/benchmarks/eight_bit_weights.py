"""Products of layers with weights in 8 bits, by what torch computes them with on a CPU: their error.

    python tests/benchmarks/eight_bit_weights.py [--hidden 256] [--steps 60]

The small Qwen3 of `codec_error.py` trains with AMCS and fp32 state; then each layer's product is set against float64
from the fp32 weights and inputs of a batch: the norm of the difference over the norm, in %. Every row of a weight has a
scale of its own, and so has every token where inputs are in 8 bits, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from codec_error import small_model
from torch import Tensor

from toolkit.optim import AMCS, param_groups

LAYERS = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj", "lm_head")
FP8 = torch.float8_e4m3fn


def in_8_bits(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of `x` to the nearest, and the scale of each row, [rows, 1]."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    codes = x / scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def bf16(x: Tensor, w: Tensor) -> Tensor:
    return x.bfloat16() @ w.bfloat16().t()


def int8_weights(x: Tensor, w: Tensor) -> Tensor:
    codes, scale = in_8_bits(w, torch.int8)
    return torch._weight_int8pack_mm(x.bfloat16(), codes, scale[:, 0].bfloat16())


def int8_both(x: Tensor, w: Tensor) -> Tensor:
    (a, of_a), (b, of_b) = in_8_bits(x, torch.int8), in_8_bits(w, torch.int8)
    return torch._int_mm(a, b.t()) * of_a * of_b.t()


def fp8_weights(x: Tensor, w: Tensor) -> Tensor:
    codes, scale = in_8_bits(w, FP8)
    return x.bfloat16() @ (codes.float() * scale).bfloat16().t()


def fp8_both(x: Tensor, w: Tensor) -> Tensor:
    (a, of_a), (b, of_b) = in_8_bits(x, FP8), in_8_bits(w, FP8)
    return torch._scaled_mm(a, b.t(), scale_a=of_a, scale_b=of_b.t().contiguous(), out_dtype=torch.bfloat16)


WAYS: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
    "bf16": (2, bf16),
    "int8 weights, bf16 inputs (`torch._weight_int8pack_mm`)": (1, int8_weights),
    "int8 weights and inputs (`torch._int_mm`, result in fp32)": (1, int8_both),
    "e4m3 weights, bf16 inputs (decoded to bf16 first)": (1, fp8_weights),
    "e4m3 weights and inputs (`torch._scaled_mm`)": (1, fp8_both),
}
"""Bytes of a weight, without scales, and the product of inputs [tokens, n] and a weight [m, n]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    model, batches = small_model(options.hidden)
    optimizer = AMCS(param_groups(model), lr=1e-3, alpha=0.7, state_format="fp32")
    inputs: dict[str, Tensor] = {}
    layers = {name: model.get_submodule(name) for name in LAYERS}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0].detach()}))
    for _ in range(options.steps):
        tokens = next(batches)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model(input_ids=next(batches))
        columns = [name.rpartition(".")[2] for name in LAYERS]
        print("| | bytes a parameter | " + " | ".join(columns) + " |\n" + "|---" * (2 + len(columns)) + "|")
        for way, (width, product) in WAYS.items():
            cells = []
            for name, layer in layers.items():
                x, w = inputs[name].flatten(0, -2), layer.weight
                exact = x.double() @ w.double().t()
                cells.append(f"{100 * float((product(x, w).double() - exact).norm() / exact.norm()):.2f}")
            # One scale for a row of the narrowest.
            held = width + 4 / options.hidden if width < 2 else width
            print(f"| {way} | {held:.2f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
