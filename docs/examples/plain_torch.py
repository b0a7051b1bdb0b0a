"""A plain PyTorch loop with AMCS: 8-bit state, and bf16 weights without an fp32 copy.

    python docs/examples/plain_torch.py

A small Qwen3 learns the bytes of a Python file. Nothing is downloaded, and no GPU is needed.
"""

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from toolkit.optim import AMCS, param_groups

STEPS, BATCH, LENGTH = 30, 8, 128

torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "head_dim": 32}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=256, max_position_embeddings=LENGTH, **shape, **heads)).bfloat16()

text = torch.tensor(list(Path(torch.nn.functional.__file__).read_bytes()))

# A parameter group for each component of the model: attention, ffn, embedding, norm, head.
optimizer = AMCS(param_groups(model), lr=3e-3, total_steps=STEPS, weights="bf16+8")

for step in range(1, STEPS + 1):
    starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
    tokens = text[starts + torch.arange(LENGTH)]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 or step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

held = sum(optimizer.state_bytes().values())
print(f"{held / sum(p.numel() for p in model.parameters()):.2f} bytes of state a parameter; AdamW in fp32 has 8")
