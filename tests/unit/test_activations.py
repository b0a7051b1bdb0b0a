"""What is kept of activations: the words, and that losses and gradients do not depend on them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import SHAPE, qwen3
from torch import Tensor

from toolkit.errors import UserError
from toolkit.models import build_model, tiled
from toolkit.models.activations import host_activations, kept_activations
from toolkit.models.offload import SMALLEST, HostActivations, _pieces
from toolkit.records.activations import Activations, parse_activations, renamed
from toolkit.records.memory import Setup
from toolkit.run.prepare import prepare
from toolkit.run.settings import check_settings, parse

WORDS = ["full", "checkpoint", "checkpoint:1", "offload", "checkpoint:1,offload", "tiled", "checkpoint,tiled"]
WORDS += ["checkpoint:2,offload,tiled", "budget:0", "budget:0.12345678"]


# --- words


@pytest.mark.parametrize("words", WORDS)
def test_words_are_read_and_written(words: str) -> None:
    assert str(Activations.read(words)) == words
    settings = parse(["--activations", words])
    assert settings is not None and settings.activations == Activations.read(words)
    assert settings.model_dump(mode="json")["activations"] == words


def test_words_have_one_meaning_in_any_order() -> None:
    assert Activations.read("tiled, checkpoint") == Activations.read("checkpoint,tiled")
    assert Activations.read("checkpoint,offload") == Activations.read("offload")
    assert Activations.read("offload").checkpoint


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "tile",
            "must be full, checkpoint, offload or tiled, or some of these with commas, or budget:SHARE. "
            "Did you mean 'tiled'?",
        ),
        ("budget:0.5,tiled", "must be either budget or tiled, not both"),
        ("budget", "must have a number from 0 to 1 after budget, as in budget:0.5"),
        ("budget:0_1", "must have a number from 0 to 1 after budget"),
        ("budget:-0", "must have a number from 0 to 1 after budget"),
        ("budget:1.5", "must have a number from 0 to 1 after budget"),
        ("budget:nan", "must have a number from 0 to 1 after budget"),
        ("", "must be full, checkpoint"),
        ("checkpoint,", "must be full, checkpoint"),
        ("full,tiled", "must be either full or tiled, not both"),
        ("checkpoint,checkpoint:2", "must name checkpoint once"),
        ("checkpoint:0", "a number of blocks from 1 on after checkpoint, as in checkpoint:4"),
        ("checkpoint:two", "a number of blocks from 1 on"),
        ("tiled:2", "a number of blocks after checkpoint only"),
    ],
)
def test_wrong_words_are_one_sentence(words: str, said: str) -> None:
    with pytest.raises(UserError) as of_command:
        parse_activations(words)
    assert said in str(of_command.value) and str(of_command.value).startswith(f"--activations is {words!r}, but ")
    if words:  # an empty one is taken for a variable of the shell
        with pytest.raises(UserError) as of_training:
            parse(["--activations", words])
        assert str(of_training.value) == str(of_command.value)


@pytest.mark.parametrize(
    "flag", ["--activation-checkpointing", "--no-activation-checkpointing", "--gradient-checkpointing"]
)
def test_flags_of_old_and_of_others_are_answered(flag: str) -> None:
    with pytest.raises(UserError, match=rf"there is no option {flag}: that is --activations checkpoint"):
        parse([flag])


def test_what_older_versions_wrote_is_read() -> None:
    assert renamed({"activation_checkpointing": True, "loss": "plain"}) == {
        "activations": "checkpoint",
        "loss": "plain",
    }
    assert renamed({"--activation-checkpointing": False}) == {"--activations": "full"}
    assert renamed({"activation_checkpointing": None}) == {"activations": None}
    old: dict[str, Any] = {
        **{"model": "m", "parameters": 1, "optimizer": "AMCS", "stage": 2, "state_format": "8bit", "weights": "bf16"},
        **{"world_size": 1, "micro_batch": 1, "gradient_accumulation": 1, "seq_len": 8, "attention": "sdpa"},
        **{"loss": "plain", "device": "cpu", "activation_checkpointing": True},
    }
    setup = Setup.model_validate(old)
    assert setup.activations == Activations(checkpoint=True)
    assert Setup.model_validate_json(setup.model_dump_json()) == setup


def test_a_cpu_has_no_host_to_offload_to() -> None:
    with pytest.raises(UserError, match="on a CPU the host is the device"):
        Activations.read("offload,tiled").check_device("cpu")
    Activations.read("offload").check_device("cuda")
    Activations.read("checkpoint,tiled").check_device("cpu")


def test_a_run_on_a_cpu_ends_with_that_sentence_before_anything_is_loaded(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("has an accelerator")
    with pytest.raises(UserError, match="--activations is 'offload', but on a CPU the host is the device"):
        prepare(check_settings(activations="offload", run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- models


def save_config(folder: Path, model_type: str, **overrides: Any) -> str:
    settings = SHAPE | {"vocab_size": 96, "pad_token_id": 0} | overrides
    transformers.AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return str(folder)


def tokens(length: int = 90) -> Any:
    return torch.randint(0, 64, (2, length + 1), generator=torch.Generator().manual_seed(0))


def trained(folder: str | Path, words: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], Any]:
    model = build_model(str(folder), dtype=dtype, seed=0, activations=Activations.read(words)).train()
    assert str(kept_activations(model)) == words
    loss = model(tokens())
    host = host_activations(model)
    if host is not None:
        assert host.held == host.most == len(model.hf.model.layers[: kept_activations(model).blocks]) * SMALLEST
    loss.backward()
    if host is not None:
        gc.collect()
        assert host.held == 0, "each block's input is let go after its backward pass"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    return loss.detach(), gradients, model


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 48)
    monkeypatch.setattr(tiled, "_ROWS", 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", ["checkpoint:1", "offload", "checkpoint:1,offload"])
def test_blocks_that_keep_their_input_alone_change_no_bit(tmp_path: Path, words: str, dtype: torch.dtype) -> None:
    folder = qwen3(tmp_path)
    loss, gradients, _ = trained(folder, "full", dtype)
    found, others, _ = trained(folder, words, dtype)
    assert torch.equal(found, loss)
    assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative, over all gradients together."""
    wide = [(found[name].double(), one.double()) for name, one in expected.items()]
    return float(sum((a - b).square().sum() for a, b in wide) / sum(b.square().sum() for _, b in wide)) ** 0.5


@pytest.mark.parametrize("words", ["tiled", "checkpoint,tiled"])
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gemma"])
def test_tiles_compute_the_same(tmp_path: Path, words: str, model_type: str, small_tiles: None) -> None:
    biased = {"mlp_bias": True} if model_type == "llama" else {}
    folder = save_config(tmp_path, model_type, **biased)
    assert len(list(tiled._tiles(180))) == 4
    loss, gradients, _ = trained(folder, "full", torch.float32)
    found, others, _ = trained(folder, words, torch.float32)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    assert error(others, gradients) < 1e-6
    again = trained(folder, words, torch.float32)[1]
    assert all(torch.equal(again[name], gradient) for name, gradient in others.items())


def test_tiles_round_no_more_than_the_whole(tmp_path: Path, small_tiles: None) -> None:
    """In bf16: as far from the gradients of fp32 as what runs untiled."""
    folder = qwen3(tmp_path)
    model = build_model(str(folder), dtype=torch.bfloat16, seed=0)
    exact = build_model(str(folder), dtype=torch.float32, seed=0)
    exact.load_state_dict(model.state_dict())
    exact.train()(tokens()).backward()
    expected = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    whole, tiles = (trained(folder, words, torch.bfloat16)[1] for words in ("full", "tiled"))
    assert error(tiles, expected) < 1.1 * error(whole, expected) < 0.02


def test_one_tile_is_the_whole(tmp_path: Path) -> None:
    folder = qwen3(tmp_path)
    loss, gradients, _ = trained(folder, "full", torch.float32)
    found, others, _ = trained(folder, "tiled", torch.float32)
    assert torch.equal(found, loss) and error(others, gradients) < 1e-6


def test_checkpointing_runs_a_tiled_mlp_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second forward pass of a block ends where the input of its MLP is known."""
    products = 0
    linear = tiled.F.linear

    def counted(*args: Any) -> Tensor:
        nonlocal products
        products += 1
        return linear(*args)

    monkeypatch.setattr(tiled, "F", type("F", (), {"linear": staticmethod(counted)}))
    _, _, model = trained(qwen3(tmp_path), "checkpoint,tiled", torch.float32)
    assert products == (3 + 2) * len(model.hf.model.layers)


def test_frozen_weights_get_no_gradient(tmp_path: Path, small_tiles: None) -> None:
    model = build_model(str(qwen3(tmp_path)), dtype=torch.float32, seed=0, activations=Activations(tiled=True)).train()
    frozen = model.hf.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    model(tokens()).backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_second_backward_pass_through_tiles_is_refused(tmp_path: Path) -> None:
    model = build_model(str(qwen3(tmp_path)), dtype=torch.float32, seed=0, activations=Activations(tiled=True)).train()
    loss = model(tokens())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_what_a_model_lacks_is_one_sentence(tmp_path: Path) -> None:
    small, gpt2 = qwen3(tmp_path / "a"), save_config(tmp_path / "b", "gpt2")
    with pytest.raises(UserError, match="'checkpoint:9', but the model has 2 blocks"):
        build_model(str(small), dtype=torch.float32, seed=0, activations=Activations.read("checkpoint:9"))
    with pytest.raises(UserError, match="the MLPs of 'gpt2' models are not known to run in tiles, only those of gemma"):
        build_model(str(gpt2), dtype=torch.float32, seed=0, activations=Activations.read("tiled"))


def test_mixtures_of_experts_are_left_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    routed = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    folder = save_config(tmp_path, "qwen3_moe", **routed)
    model = build_model(str(folder), dtype=torch.float32, seed=0, activations=Activations(tiled=True)).train()
    assert [isinstance(layer.mlp, tiled.TiledMLP) for layer in model.hf.model.layers] == [True, False]
    assert "some blocks are mixtures of experts, which are left as they are" in caplog.text
    model(tokens()).backward()


# --- the host


def test_host_memory_comes_in_powers_of_two() -> None:
    for size in (1, SMALLEST, SMALLEST + 1, 320 * SMALLEST, 11 * SMALLEST - 5):
        pieces = _pieces(size)
        assert all(piece.bit_count() == 1 for piece in pieces) and 0 <= sum(pieces) - size < SMALLEST


def test_what_was_never_used_again_is_let_go() -> None:
    """A forward pass without a backward pass, as when a step fails, and a graph that is used twice."""
    host = HostActivations()

    def run(x: Tensor) -> Tensor:
        def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)

        for _ in range(3):
            x = host.wrap(checkpoint)(lambda y: (y * y).sin(), x * 1.5)
        return x.sum()

    x = torch.linspace(0, 1, 50, requires_grad=True)
    dropped = run(x)
    assert host.held == 3 * SMALLEST
    del dropped
    kept = run(x)
    kept.backward(retain_graph=True)
    first, x.grad = x.grad, None
    kept.backward()
    assert first is not None and x.grad is not None and torch.equal(first, x.grad)
    del kept
    gc.collect()
    assert host.held == 0 and host.most <= 4 * SMALLEST
