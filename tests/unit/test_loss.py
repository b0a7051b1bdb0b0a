"""The loss head: transformers' own loss and gradients, at a fraction of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import SHAPE
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from toolkit.models import build_model
from toolkit.models import loss as module
from toolkit.models.loss import CHUNKABLE, LossHead, linear_cross_entropy, plain_loss

SMALL: dict[str, Any] = {
    "vocab_size": 160,
    **SHAPE,
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


def wide(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """What a GPU does with 16-bit operands: products and sums in fp32."""
    torch.mm(a.float(), b.float(), out=out)


@pytest.fixture(params=["here", "widened", "GPU"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How 16-bit matrices are multiplied: as this CPU does, as one without bf16 products does, as a GPU does."""
    if request.param != "here":
        operand = torch.float32 if request.param == "widened" else None
        monkeypatch.setattr(module, "products", lambda device, dtype: (operand or dtype, wide))
    return str(request.param)


Problem = dict[str, torch.Tensor]


def problem(tokens: int, features: int, vocab: int, dtype: torch.dtype, *, bias: bool = False) -> Problem:
    """Tokens of which some are predicted well and some badly, rare and frequent ones, in `dtype`."""
    generator = torch.Generator().manual_seed(3)
    targets = (vocab ** torch.rand(tokens, generator=generator)).long().clamp(max=vocab - 1)
    weight = torch.randn(vocab, features, generator=generator) + torch.randn(features, generator=generator)
    sure = torch.rand(tokens, 1, generator=generator)
    hidden = torch.randn(tokens, features, generator=generator) + sure * weight[targets]
    made = {"hidden": hidden, "weight": weight * 5 / (hidden @ weight[:1000].t()).std()}
    if bias:
        made["bias"] = torch.randn(vocab, generator=generator)
    return {name: value.to(dtype) for name, value in made.items()} | {"targets": targets}


def solve(given: Problem, scale: float = 1.0) -> list[torch.Tensor]:
    """The loss, and the gradients of hidden, weight and bias if there is one."""
    leaves = {name: value.clone().requires_grad_(name != "targets") for name, value in given.items()}
    loss = linear_cross_entropy(**leaves)
    (loss * scale).backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    return [loss.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def solve_exactly(given: Problem) -> list[torch.Tensor]:
    """The same of whole logits in float64, from the same operands."""
    leaves = {name: value.double().requires_grad_() for name, value in given.items() if name != "targets"}
    loss = F.cross_entropy(F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias")), given["targets"])
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]


# Relative, of gradients: one rounding of them and one of p, 0.17 % each in bf16; the loss itself is always fp32.
LIMITS = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [4096, 1000, 37])
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_gradients_are_rounded_once_however_many_chunks(
    arithmetic: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int, bias: bool
) -> None:
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)
    given = problem(700, 96, 3000, dtype, bias=bias)
    found = solve(given)
    assert all(x.dtype == dtype for x in found[1:])
    loss, *gradients = errors(found, solve_exactly(given))
    assert loss < 1e-5 and max(gradients) < LIMITS[dtype], (loss, gradients)
    assert all(torch.equal(x, y) for x, y in zip(found, solve(given), strict=True))


@pytest.mark.slow
def test_gradients_at_the_size_of_134m(arithmetic: str) -> None:
    given = problem(1000, 768, 32_000, torch.bfloat16)
    loss, *gradients = errors(solve(given), solve_exactly(given))
    assert loss < 1e-5 and max(gradients) < LIMITS[torch.bfloat16], (loss, gradients)


def test_fp16_gradients_survive_by_the_loss_scale(arithmetic: str) -> None:
    """Gradients below 3e-8 are zero in fp16, unless the scale is there when they are computed."""
    generator = torch.Generator().manual_seed(4)
    given = {
        "hidden": (torch.randn(512, 32, generator=generator) * 5e-3).half(),
        "weight": (torch.randn(20_000, 32, generator=generator) * 5e-3).half(),
        "targets": torch.randint(0, 20_000, (512,), generator=generator),
    }
    scale = 2.0**20
    _, *found = solve(given, scale)
    _, *exact = solve_exactly(given)
    # Most rows of the vocabulary get p = 5e-5 of each token and nothing else.
    assert max(errors([x.double() / scale for x in found], exact)) < LIMITS[torch.float16]
    rare = torch.ones(20_000, dtype=torch.bool)
    rare[given["targets"]] = False
    assert exact[1][rare].abs().max() < 2.9e-8
    assert max(errors([found[1][rare].double() / scale], [exact[1][rare]])) < 5e-3


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_only_what_needs_a_gradient_gets_one(wanted: tuple[str, ...]) -> None:
    given = problem(50, 16, 300, torch.bfloat16, bias=True)
    whole = dict(zip(("hidden", "weight", "bias"), solve(given)[1:], strict=True))
    leaves = {name: value.clone().requires_grad_(name in wanted) for name, value in given.items()}
    linear_cross_entropy(**leaves).backward()
    for name, gradient in whole.items():
        assert torch.equal(leaves[name].grad, gradient) if name in wanted else leaves[name].grad is None


@pytest.mark.parametrize("target", [-100, 300])
def test_a_target_outside_of_the_vocabulary_is_not_passed_over(target: int) -> None:
    given = problem(50, 16, 300, torch.float32)
    given["targets"][7] = target
    loss, hidden, weight = solve(given)
    assert loss.isnan() and hidden[7].isnan().all() and weight.isnan().all()


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


@pytest.mark.parametrize("tokens", [256, 2048])
def test_the_loss_holds_no_more_than_it_says(tokens: int) -> None:
    """In fp32, where a CPU does as it says; what 16-bit products hold beside it is part of the estimate."""
    features, vocab = 64, 30_000
    given = problem(tokens, features, vocab, torch.float32)
    leaves = {name: value.requires_grad_(name != "targets") for name, value in given.items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        linear_cross_entropy(**leaves).backward()
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    chunk = module.CHUNK["cpu"]
    gradients = 4 * (vocab * features + tokens * features)
    forward = 8 * tokens * chunk
    backward = 6 * tokens * max(chunk, features) + 4 * tokens * features + 4 * chunk * features + gradients
    assert peak < max(forward, backward) + 200 * tokens
    # Of the full logits the plain loss holds two and more.
    assert peak < 4 * tokens * vocab / 2 + gradients


def test_many_tokens_have_fewer_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, chunk in module.CHUNK.items():
        for tokens in (1, 4096, module.MANY):
            assert module.chunk_of(device, tokens, 10**6) == chunk
        for tokens in (module.MANY + 1, 100_000, 400_000):
            fewer = module.chunk_of(device, tokens, 10**6)
            assert fewer % 128 == 0 and 128 <= fewer < chunk
            assert fewer == 128 or chunk * module.MANY - 128 * tokens < tokens * fewer <= chunk * module.MANY
        assert module.chunk_of(device, 10**7, 100) == 100
    given = problem(300, 64, 1000, torch.bfloat16)
    results = []
    for many in (module.MANY, 40):
        monkeypatch.setattr(module, "MANY", many)
        leaves = {name: value.clone().requires_grad_(name != "targets") for name, value in given.items()}
        value = linear_cross_entropy(**leaves)
        value.backward()
        results.append((value.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}))
    (loss, expected), (found, gradients) = results
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().max()))


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
