"""Ranks that share every sequence: Ulysses attention, by DeepSpeed's own layer, under engines of this package."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.sequence.layer import DistributedAttention
from ranks import serve
from torch import Tensor, distributed, nn
from torch.nn import functional as F

import toolkit
from toolkit.errors import UserError
from toolkit.zero import full_precision_state_dict

VOCABULARY, WIDTH, HEADS, LENGTH, ROWS = 64, 32, 4, 16, 2


class Attention(nn.Module):
    """Causal, of (rows, length, heads, width of a head): of whole sequences, and of these heads."""

    def forward(self, *given: Any) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in given[:3])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


class Net(nn.Module):
    """One layer; `forward` gives this rank's part of the mean loss over all tokens of its sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.attention: nn.Module = Attention()

    def forward(self, tokens: Tensor, targets: Tensor, first: int) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(first, first + tokens.shape[1]))
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)) for layer in (self.q, self.k, self.v))
        mixed = self.attention(q, k, v, 0)
        logits = self.head(x + self.out(mixed.flatten(-2)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (ROWS * LENGTH)


def train(config: dict[str, Any], steps: int, sharing: int) -> dict[str, Any]:
    """Losses over whole sequences, gradient norms and the last weights, where `sharing` ranks have a part of each."""
    torch.manual_seed(0)
    model = Net()
    part, mpu = 0, None
    if sharing > 1:
        mpu = parallel_state_sp
        if mpu._SEQUENCE_PARALLEL_GROUP is None:
            mpu.initialize_sequence_parallel(sharing)
        group = mpu.get_sequence_parallel_group()
        part = distributed.get_rank(group)
        model.attention = DistributedAttention(model.attention, group, scatter_idx=2, gather_idx=1)
    engine = toolkit.initialize(model, config, total_steps=steps, mpu=mpu)[0]
    replica, replicas = distributed.get_rank() // sharing, distributed.get_world_size() // sharing
    mine = slice(part * LENGTH // sharing, (part + 1) * LENGTH // sharing)
    losses, norms = [], []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        drawn = torch.randint(VOCABULARY, (replicas, ROWS, LENGTH + 1), generator=generator)[replica]
        tokens, targets = drawn[:, :-1], drawn[:, 1:]
        loss = engine(tokens[:, mine], targets[:, mine], mine.start)
        engine.backward(loss)
        engine.step()
        whole = loss.detach().clone()
        distributed.all_reduce(whole)
        losses.append(float(whole) / replicas)
        norms.append(float(engine.get_global_grad_norm()))
    return {"losses": losses, "norms": norms, "weights": full_precision_state_dict(engine)}


def refused(config: dict[str, Any], keys: dict[str, Any], **given: Any) -> list[str]:
    """What toolkit.initialize says of the JSON with `keys`, and a plain deepspeed.initialize of the same."""
    toolkit.register()
    said = []
    for initialize in (toolkit.initialize, deepspeed.initialize):
        with pytest.raises(UserError) as caught:
            initialize(model=Net(), config=config | keys, **given)
        said.append(str(caught.value))
    return said


if __name__ == "__main__":
    serve({"train": train, "refused": refused})
