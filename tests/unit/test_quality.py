"""Training quality of compressed state: a real Qwen3 on real text, 8-bit against fp32 state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from toolkit.data import PackedTokens, load_tokenizer, open_documents
from toolkit.optim import AMCS, SOAM, param_groups

STEPS, ROWS, SEQ_LEN = 200, 8, 32


@pytest.fixture(scope="module")
def batches() -> tuple[list[torch.Tensor], torch.Tensor]:
    """200 training batches and one validation batch of the standard library's source."""
    documents, tokenizer = open_documents("stdlib"), load_tokenizer("python-4k")

    def read(part: Any, rows: int) -> torch.Tensor:
        packed = PackedTokens(documents, tokenizer, SEQ_LEN, seed=0, part=part, shuffle_window=256).sequences()
        return torch.stack([torch.as_tensor(next(packed)) for _ in range(rows)])

    return list(read("train", STEPS * ROWS).split(ROWS)), read("validation", 64)


def final_loss(rule: Any, batches: tuple[list[torch.Tensor], torch.Tensor], **settings: Any) -> tuple[float, float]:
    """Validation loss before and after training."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = rule(param_groups(model), **settings)
    train, held_out = batches

    def validate() -> float:
        with torch.no_grad():
            return model(input_ids=held_out, labels=held_out).loss.item()

    before = validate()
    for step, tokens in enumerate(train):
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            # Without the decay the last batches alone move the loss more than the format does.
            group["lr"] = settings["lr"] * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return before, validate()


@pytest.mark.parametrize(
    ("rule", "settings"),
    [(AMCS, {"lr": 2e-3, "total_steps": STEPS}), pytest.param(SOAM, {"lr": 2e-3}, marks=pytest.mark.slow)],
)
def test_8_bit_state_trains_as_well_as_fp32(
    rule: Any, settings: dict[str, Any], batches: tuple[list[torch.Tensor], torch.Tensor]
) -> None:
    before, exact = final_loss(rule, batches, state_format="fp32", **settings)
    _, compressed = final_loss(rule, batches, state_format="8bit", **settings)
    print(f"{rule.__name__}: before {before:.4f}, fp32 state {exact:.4f}, 8-bit state {compressed:.4f}")
    assert exact < before - 1.5, "it did learn"
    assert compressed == pytest.approx(exact, rel=0.005)
