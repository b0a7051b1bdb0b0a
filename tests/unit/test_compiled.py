"""`--compile-model`: the same losses and gradients, nothing left behind by compiling, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import qwen3
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.models import CausalLM, build_model, compiled
from toolkit.records.activations import Activations
from toolkit.run.prepare import prepare
from toolkit.run.settings import check_settings


def model_of(folder: Path, words: str) -> CausalLM:
    return build_model(qwen3(folder), dtype=torch.float32, seed=0, activations=Activations.read(words), loss="chunked")


def step(model: CausalLM, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(tokens)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("words", ["full", "checkpoint:1,tiled", "budget:0.3"])
def test_a_compiled_model_computes_the_same_and_compiles_before_its_first_step(tmp_path: Path, words: str) -> None:
    torch._dynamo.reset()
    tokens = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(0))
    plain, model = model_of(tmp_path, words), model_of(tmp_path, words)
    compiled.compile_blocks(model)
    before = torch.get_rng_state()
    compiled.warm(model, torch.zeros_like(tokens), evaluates=True)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(p.grad is None for p in model.parameters())
    with torch.compiler.set_stance("fail_on_recompile"):
        loss, gradients = step(model, tokens)
        with torch.no_grad():
            held_out = model.eval()(tokens)
    wanted, others = step(plain, tokens)
    assert torch.allclose(loss, wanted, rtol=1e-6) and torch.allclose(held_out, wanted, rtol=1e-6)
    assert len(gradients) == len(others)
    for own, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def kept(model: CausalLM, tokens: Tensor) -> int:
    """Bytes that a forward pass leaves for the backward pass."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = model(tokens)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    loss.backward()
    return sum(event.nbytes() for event in events)


def test_a_budget_is_what_a_compiled_model_keeps(tmp_path: Path) -> None:
    tokens = torch.randint(0, 96, (4, 129), generator=torch.Generator().manual_seed(0))
    found = {}
    for words in ("budget:1", "budget:0.5", "budget:0"):
        torch._dynamo.reset()
        model = model_of(tmp_path, words)
        compiled.compile_blocks(model)
        model(tokens).backward()
        found[words] = kept(model, tokens)
    compiled.compile_blocks(model_of(tmp_path, "full"))
    assert torch._functorch.config.activation_memory_budget == 1
    most, half, least = found.values()
    inputs = 4 * 128 * 32 * 4
    assert 2 * inputs < least < 0.5 * most, "of two blocks their inputs, and the head's"
    assert least < half <= least + 0.5 * (most - least) * 1.01
    assert most < kept(model_of(tmp_path, "full"), tokens)


def test_a_budget_needs_the_compiler(tmp_path: Path) -> None:
    settings = check_settings(activations="budget:0.5", run_dir=tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="--activations is 'budget:0.5', and it is torch's compiler that keeps"):
        prepare(settings)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_compiled_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--compile-model: the model has no blocks that can be told apart"):
        compiled.compile_blocks(nn.Sequential(nn.Linear(2, 2)))

    def broken(*given: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    torch._dynamo.reset()
    model = model_of(tmp_path, "full")
    compiled.compile_blocks(model)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    with pytest.raises(UserError, match=r"compiling the model failed \(.*no C\+\+ compiler.*\); leave the flag out\.$"):
        compiled.warm(model, torch.zeros((1, 5), dtype=torch.int64), evaluates=False)


def test_stage_3_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    settings = check_settings(compile_model=True, config="amcs_zero3", run_dir=tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="--compile-model works at ZeRO stages 0, 1 and 2"):
        prepare(settings)
