"""Next-token cross-entropy, with or without ever building the full logits.

The loss is computed inside the forward of the head itself: under ZeRO-3 DeepSpeed gathers a module's weights
when that module's forward and backward run, so nothing outside it may touch ``head.weight``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOSSES = ("chunked", "plain")

# hidden [tokens, hidden_size], weight [vocab, hidden_size], targets [tokens], bias [vocab] or None -> fp32 []
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# Architectures whose logits are exactly head(last hidden state): others scale or cap them on the way out.
CHUNKABLE = frozenset(
    {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "llama", "mistral", "mixtral", "gemma", "gpt2", "gpt_neox"}
)


def chunked_kernel(dtype: torch.dtype, *, on_gpu: bool) -> tuple[Kernel | None, str]:
    """The best kernel that never builds the full logits, and what it is in words.

    The kernel is None where there is none; the words then say why. torch's own comes first, then Liger's on a
    GPU, if installed and the weights are not fp16: Liger computes gradients in the forward pass, before the
    loss scale could keep them from underflowing.
    """
    if torch.__version__ >= "2.13":  # a TorchVersion, which compares as versions do
        return _torch_kernel, "torch.nn.functional.linear_cross_entropy, in chunks of tokens"
    lacking = f"torch {torch.__version__} has no chunked linear_cross_entropy (2.13 has)"
    if not on_gpu or importlib.util.find_spec("liger_kernel") is None:
        return None, f"{lacking} and Liger is not installed" if on_gpu else lacking
    if dtype == torch.float16:
        return None, f"{lacking} and Liger's would lose small fp16 gradients"
    return _liger_kernel, "Liger's fused linear cross-entropy"


def _torch_kernel(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Mean loss by ``torch.nn.functional.linear_cross_entropy``.

    Asks for each token's own loss rather than the mean, for three reasons. The mean would come back rounded
    to the dtype of `hidden`, a step of 0.016 for a bf16 loss of 3; rounded losses of single tokens even out in
    an fp32 mean. Its gradients would be computed in the forward pass, before fp16's loss scale is there. And
    they would wait for the backward pass in a second weight-sized buffer; instead the logits are computed
    again, chunk by chunk.

    With bf16 on a CPU torch works on fp32 copies of the weight and of its gradient while it runs, and is
    several times slower than a plain bf16 product; on a GPU it makes no copy.
    """
    # Each chunk passes over the whole weight gradient. torch's choice for GPUs is measured; the few dozen tokens
    # it takes on a CPU cost twice the time of 256.
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=None if hidden.is_cuda else 256)
    losses = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="none", options=options)
    return losses.float().mean()


def _liger_kernel(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Mean loss by Liger, which keeps one weight-sized gradient from the forward to the backward pass."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets, bias).float()


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, 0-d fp32: logits [micro_batch, seq_len, vocab], targets int64 [micro_batch, seq_len]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class LossHead(nn.Linear):
    """A vocabulary head that returns the loss when it is given targets, and logits when it is not."""

    kernel: Kernel

    @classmethod
    def adopt(cls, head: nn.Linear, kernel: Kernel) -> LossHead:
        """Turn `head` itself into a LossHead: same module, same parameters, same names."""
        head.__class__ = cls
        assert isinstance(head, cls)
        head.kernel = kernel
        return head

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """`hidden` [micro_batch, seq_len, hidden_size], `targets` int64 [micro_batch, seq_len] -> 0-d fp32."""
        if targets is None:
            return super().forward(hidden)
        return self.kernel(hidden.flatten(0, 1), self.weight, targets.flatten(), self.bias)
