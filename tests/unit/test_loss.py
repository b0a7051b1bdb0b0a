"""The loss head: transformers' own loss and gradients, at a fraction of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from toolkit.models import build_model
from toolkit.models.loss import CHUNKABLE, LossHead, chunked_kernel, plain_loss

SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": MOE,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {"num_key_value_heads": None},
}


def save_config(folder: Path, model_type: str, **overrides: object) -> str:
    settings = SMALL | OVERRIDES.get(model_type, {}) | overrides
    transformers.AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return str(folder)


def tokens_for(rows: int = 3, length: int = 41, vocab: int = 160) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(7))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("model_type", sorted(CHUNKABLE))
@pytest.mark.parametrize("loss", ["chunked", "plain"])
def test_loss_and_gradients_are_those_of_transformers(tmp_path: Path, model_type: str, loss: str) -> None:
    model = build_model(save_config(tmp_path, model_type), dtype=torch.float32, seed=0, loss=loss).eval()
    assert isinstance(model.hf.get_output_embeddings(), LossHead) == (loss == "chunked")
    tokens = tokens_for()
    ours = model(tokens)
    assert ours.shape == () and ours.dtype == torch.float32
    ours.backward()
    got = gradients(model)
    model.zero_grad()
    # transformers shifts by itself: the last position has no target.
    theirs = model.hf(input_ids=tokens, labels=tokens).loss
    theirs.backward()
    want = gradients(model)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert got.keys() == want.keys() == dict(model.named_parameters()).keys()
    for name in want:
        difference = (got[name] - want[name]).abs().max().item()
        assert difference <= 1e-6 + 1e-4 * want[name].abs().max().item(), name


def test_bf16_chunked_loss_is_as_close_to_fp32_as_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(512, 64, generator=generator).bfloat16()
    weight = (torch.randn(2048, 64, generator=generator) * 0.1).bfloat16()
    targets = torch.randint(0, 2048, (512,), generator=generator)
    kernel, _ = chunked_kernel(torch.bfloat16, on_gpu=False)
    assert kernel is not None

    def run(dtype: torch.dtype, chunked: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = hidden.to(dtype).requires_grad_()
        w = weight.to(dtype).requires_grad_()
        loss = kernel(h, w, targets, None) if chunked else plain_loss(F.linear(h, w)[None], targets[None])
        loss.backward()
        assert loss.dtype == torch.float32 and h.grad is not None and w.grad is not None
        return loss.detach(), h.grad.float(), w.grad.float()

    exact = run(torch.float32, False)
    errors = {
        chunked: [
            (got - want).norm() / want.norm() for got, want in zip(run(torch.bfloat16, chunked), exact, strict=True)
        ]
        for chunked in (True, False)
    }
    # A mean rounded to bf16 would be off by up to 4e-3.
    assert errors[True][0] < 3e-4
    for chunked, plain in zip(errors[True][1:], errors[False][1:], strict=True):
        assert chunked < max(1.2 * plain, 4e-3)


def test_fp16_chunked_gradients_survive_by_the_loss_scale() -> None:
    """Gradients of 1e-9 are zero in fp16, unless the scale is there when they are computed."""
    generator = torch.Generator().manual_seed(4)
    weight = (torch.randn(512, 32, generator=generator) * 1e-4).half().requires_grad_()
    hidden = (torch.randn(1024, 32, generator=generator) * 1e-2).half().requires_grad_()
    kernel, _ = chunked_kernel(torch.float16, on_gpu=False)
    assert kernel is not None
    (kernel(hidden, weight, torch.randint(0, 512, (1024,), generator=generator), None) * 2.0**14).backward()
    assert hidden.grad is not None and (hidden.grad != 0).float().mean() > 0.9


def test_head_gives_logits_without_targets_and_the_loss_without_gradients(tmp_path: Path) -> None:
    model = build_model(save_config(tmp_path, "qwen3"), dtype=torch.bfloat16, seed=0, loss="chunked").eval()
    tokens = tokens_for()
    with torch.no_grad():
        quiet = model(tokens)
        logits = model.hf(input_ids=tokens[:, :-1]).logits
    assert logits.shape == (3, 40, 160) and not quiet.requires_grad
    torch.testing.assert_close(model(tokens).detach(), quiet, rtol=0, atol=0)
    torch.testing.assert_close(plain_loss(logits, tokens[:, 1:]), quiet, rtol=2e-3, atol=0)
    reference = transformers.AutoModelForCausalLM.from_config(model.hf.config)
    assert model.hf.state_dict().keys() == reference.state_dict().keys()


def peak_bytes(model: torch.nn.Module, tokens: torch.Tensor) -> int:
    """Most bytes allocated at once by a forward and a backward pass, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(tokens).backward()
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def test_chunked_loss_never_holds_the_full_logits(tmp_path: Path) -> None:
    rows, length, vocab = 8, 256, 8192
    folder = save_config(tmp_path, "qwen3", vocab_size=vocab, num_hidden_layers=1, max_position_embeddings=512)
    tokens = tokens_for(rows, length + 1, vocab)
    full_logits = rows * length * vocab * 4
    peaks = {}
    for loss in ("chunked", "plain"):
        model = build_model(folder, dtype=torch.float32, seed=0, loss=loss)
        peaks[loss] = peak_bytes(model, tokens)
    assert peaks["chunked"] < full_logits / 3
    assert peaks["plain"] > full_logits


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("gemma2", {"final_logit_softcapping": 30.0}), ("cohere", {"logit_scale": 0.0625})],
)
def test_scaled_logits_fall_back_to_plain_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model_type: str, overrides: dict[str, float]
) -> None:
    folder = save_config(tmp_path, model_type, **overrides)
    model = build_model(folder, dtype=torch.float32, seed=0, loss="chunked").eval()
    assert "plain" in caplog.text and model_type in caplog.text
    tokens = tokens_for()
    torch.testing.assert_close(model(tokens), model.hf(input_ids=tokens, labels=tokens).loss)


def test_old_torch_falls_back_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
    model = build_model(save_config(tmp_path, "qwen3"), dtype=torch.float32, seed=0, loss="chunked")
    assert "2.11.0 has no chunked" in caplog.text
    tokens = tokens_for()
    model.eval()
    torch.testing.assert_close(model(tokens), model.hf(input_ids=tokens, labels=tokens).loss)
