"""Presets, parameter counts, configurations, deterministic construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import qwen3
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from toolkit.errors import UserError
from toolkit.models import PRESETS, build_model, count_parameters, flops_per_token, load_config, peak_flops
from toolkit.models.build import skeleton
from toolkit.records.activations import Activations

TOTALS = {
    "qwen3-3m": 3_344_576,
    "qwen3-tiny": 5_049_088,
    "qwen3-134m": 134_107_392,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def tokens_for(vocab: int = 96) -> torch.Tensor:
    return torch.randint(0, vocab, (2, 17), generator=torch.Generator().manual_seed(0))


# --- presets and arithmetic


def test_every_preset_is_listed() -> None:
    assert list(PRESETS) == list(TOTALS)


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_parameter_totals(name: str, total: int) -> None:
    config, preset = load_config(name)
    assert preset is PRESETS[name]
    assert count_parameters(config) == total
    assert sum(parameter.numel() for parameter in skeleton(config).parameters()) == total


def test_134m_has_the_pinned_shape() -> None:
    config, preset = load_config("qwen3-134m")
    assert preset is not None
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32_000, 768, 2048)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (12, 12, 12)
    assert config.head_dim == 64 and not config.tie_word_embeddings


def test_published_presets_share_qwens_constants() -> None:
    for name in [name for name in list(PRESETS)[3:] if name.startswith("qwen3")]:
        config, preset = load_config(name)
        assert preset is not None
        assert config.rope_parameters["rope_theta"] == 1e6 and config.rms_norm_eps == 1e-6
        assert config.vocab_size == 151_936 and config.head_dim == 128
        assert preset.activations.checkpoint == (name != "qwen3-0.6b") and preset.loss == "chunked"


def test_the_shapes_of_other_families_are_the_published_ones() -> None:
    config, _ = load_config("llama3-70b")
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 80, 8192)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (5e5, 1e-5)
    assert (config.max_position_embeddings, config.head_dim, config.tie_word_embeddings) == (8192, 128, False)
    config, _ = load_config("qwen3-30b-a3b")
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen3_moe", 128, 8)
    assert (config.moe_intermediate_size, config.decoder_sparse_step, config.mlp_only_layers) == (768, 1, [])


def test_presets_cannot_be_changed_through_a_config() -> None:
    load_config("qwen3-tiny")[0].vocab_size = 7
    assert load_config("qwen3-tiny")[0].vocab_size == 4096


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen3Config(num_hidden_layers=3, attention_bias=True, hidden_size=512, intermediate_size=64),
        transformers.Qwen3Config(num_hidden_layers=1, tie_word_embeddings=True, hidden_size=64, head_dim=24),
        transformers.GPT2Config(n_layer=2),
        transformers.LlamaConfig(num_hidden_layers=2, hidden_size=256, intermediate_size=300, vocab_size=1000),
    ],
)
def test_count_agrees_with_a_real_model(config: transformers.PretrainedConfig) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


# --- arithmetic


def test_flops_of_134m_are_those_of_its_shapes() -> None:
    """Written from the table of the model, and not from its code."""
    config, _ = load_config("qwen3-134m")
    layer = 4 * 768 * 768 + 3 * 768 * 2048
    assert flops_per_token(config, 1024) == 6 * (12 * layer + 32_000 * 768) + 12 * 12 * 12 * 64 * 1024


@pytest.mark.parametrize("tied", [True, False])
def test_flops_agree_with_those_that_torch_counts(tied: bool) -> None:
    """A forward and a backward pass, attention as plain products, which computes what causality masks, too."""
    config = transformers.Qwen3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros((3, 16), dtype=torch.int64)).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if str(operation) in ("aten.mm", "aten.bmm"))
    rotary = 3 * 2 * 8 // 2 * 16 * 2  # frequencies times places: a product of matrices, too
    assert products == pytest.approx(3 * 16 * flops_per_token(config, 16), abs=rotary)


def test_flops_of_experts_are_those_that_a_token_passes_through() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 96}
    config = transformers.MixtralConfig(**shape, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    config.num_key_value_heads = 4
    weights = 4 * 32 * 32 + 8 * 32 + 2 * 3 * 32 * 48 + 96 * 32
    assert flops_per_token(config, 64) == 6 * weights + 12 * 32 * 64


def test_windows_bound_what_a_token_attends_to() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 96}
    config = transformers.Qwen3Config(**shape, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert flops_per_token(config, 64) - flops_per_token(config, 16) == 12 * 32 * (64 - 16)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_known_by_the_whole_name_only(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


# --- what a user can get wrong


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen-134m", "Did you mean 'qwen3-134m'"),
        ("Qwen3-0.6B", "Did you mean 'qwen3-0.6b'"),
        ("./no/such/folder", "does not exist"),
        ("Qwen/Qwen3-0.6B", "`hf download Qwen/Qwen3-0.6B` puts it there. Did you mean 'qwen3-0.6b'"),
        ("gpt-17", "expected one of qwen3-3m, qwen3-tiny, qwen3-134m"),
    ],
)
def test_unknown_model(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(name)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no config.json"):
        load_config(str(tmp_path))
    file = tmp_path / "config.json"
    for text in ("{", "{}", '{"model_type": "nonesuch"}', '{"model_type": "qwen3", "hidden_size": "wide"}'):
        file.write_text(text)
        with pytest.raises(UserError, match="not a usable model configuration") as caught:
            load_config(str(tmp_path))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not a usable model configuration"):
        load_config(str(file))  # stands for its folder
    other = tmp_path / "model.safetensors"
    other.touch()
    with pytest.raises(UserError, match="is a file"):
        load_config(str(other))


@pytest.mark.parametrize("config", [transformers.BertConfig(), transformers.T5Config(), transformers.ViTConfig()])
def test_folder_of_something_else(tmp_path: Path, config: transformers.PretrainedConfig) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"'{config.model_type}' model, which is not a causal language model"):
        load_config(str(tmp_path))


def test_bad_build_arguments(tmp_path: Path) -> None:
    folder = qwen3(tmp_path)
    with pytest.raises(UserError, match="Did you mean 'chunked'"):
        build_model(folder, dtype=torch.float32, seed=0, loss="chunkd")
    with pytest.raises(UserError, match="positive number of tokens, not 0"):
        build_model(folder, dtype=torch.float32, seed=0, vocab_size=0)
    with pytest.raises(UserError, match="preset .* has no weights to load"):
        build_model("qwen3-tiny", dtype=torch.float32, seed=0, from_checkpoint=True)
    with pytest.raises(UserError, match="cannot be loaded"):
        build_model(folder, dtype=torch.float32, seed=0, from_checkpoint=True)


# --- construction


def test_weights_follow_the_seed_and_the_rule(tmp_path: Path) -> None:
    folder = qwen3(tmp_path, hidden_size=64, attention_bias=True, initializer_range=0.05)
    state = torch.random.get_rng_state()
    first = build_model(folder, dtype=torch.float32, seed=1).hf.state_dict()
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's generator moved"
    torch.manual_seed(99)
    again = build_model(folder, dtype=torch.float32, seed=1).hf.state_dict()
    other = build_model(folder, dtype=torch.float32, seed=2).hf.state_dict()
    seen = set()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        if "norm" in name:
            assert (tensor == 1).all(), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        else:
            assert abs(tensor.std().item() - 0.05) < 0.003 and abs(tensor.mean().item()) < 0.005, name
            assert not torch.equal(tensor, other[name]), name
            seen.add(tensor.flatten()[0].item())
    assert len(seen) == 7 * 2 + 2, "two matrices were drawn alike"


def test_low_precision_weights_are_the_rounded_fp32_draw(tmp_path: Path) -> None:
    folder = qwen3(tmp_path)
    full = build_model(folder, dtype=torch.float32, seed=5).hf.state_dict()
    half = build_model(folder, dtype=torch.bfloat16, seed=5).hf.state_dict()
    for name, tensor in half.items():
        assert torch.equal(tensor, full[name].bfloat16()), name


def test_other_architectures_keep_their_own_rule(tmp_path: Path) -> None:
    transformers.GPT2Config(n_embd=64, n_layer=8, n_head=4, vocab_size=100).save_pretrained(tmp_path / "gpt2")
    gpt2: Any = build_model(str(tmp_path / "gpt2"), dtype=torch.float32, seed=0).hf
    # The residual projections start smaller, by the square root of twice the number of layers.
    assert gpt2.transformer.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert gpt2.transformer.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    transformers.GemmaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    ).save_pretrained(tmp_path / "gemma")
    gemma: Any = build_model(str(tmp_path / "gemma"), dtype=torch.float32, seed=0).hf
    assert (gemma.model.norm.weight == 0).all()  # its norms multiply by 1 + weight


@pytest.mark.parametrize("tied", [True, False])
def test_tied_matrices_and_buffers(tmp_path: Path, tied: bool) -> None:
    folder = qwen3(tmp_path, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    model = build_model(folder, dtype=torch.bfloat16, seed=0)
    assert (model.hf.lm_head.weight is model.hf.model.embed_tokens.weight) == tied
    assert sum(p.numel() for p in model.parameters()) == count_parameters(model.hf.config)
    assert all(p.dtype == torch.bfloat16 and p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    frequencies = 1.0 / (1e6 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8))
    for name in ("inv_freq", "original_inv_freq"):
        assert torch.equal(getattr(model.hf.model.rotary_emb, name), frequencies)


def test_vocabulary_can_be_replaced(tmp_path: Path) -> None:
    model = build_model(qwen3(tmp_path), dtype=torch.float32, seed=0, vocab_size=50)
    assert model.hf.config.vocab_size == 50
    assert model.hf.get_input_embeddings().weight.shape == model.hf.lm_head.weight.shape == (50, 32)
    assert torch.isfinite(model(tokens_for(50)))


def test_building_holds_one_copy_at_most(tmp_path: Path) -> None:
    # The embeddings' share is that of the 134M model.
    folder = qwen3(tmp_path, vocab_size=3072, hidden_size=128, intermediate_size=384, num_hidden_layers=8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_model(folder, dtype=torch.bfloat16, seed=0)
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    one_copy = 2 * sum(parameter.numel() for parameter in model.parameters())
    # A full fp32 copy would be twice as much.
    assert one_copy <= peak < 1.2 * one_copy


# --- activation checkpointing


@pytest.mark.parametrize("loss", ["chunked", "plain"])
def test_activation_checkpointing_changes_memory_and_nothing_else(tmp_path: Path, loss: str) -> None:
    folder = qwen3(tmp_path, tie_word_embeddings=True)
    results = []
    for on in (True, False):
        model = build_model(
            folder, dtype=torch.float32, seed=0, activations=Activations(checkpoint=on), loss=loss
        ).train()
        assert model.hf.is_activation_checkpointing is on
        calls: list[int] = []
        model.hf.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        value = model(tokens_for())
        value.backward()
        assert len(calls) == (2 if on else 1), "the layer is run again in the backward pass"
        results.append((value.detach(), gradients(model)))
    (with_loss, with_grads), (without_loss, without_grads) = results
    assert torch.equal(with_loss, without_loss)
    assert with_grads.keys() == without_grads.keys() == dict(model.named_parameters()).keys()
    for name, gradient in without_grads.items():
        assert torch.equal(with_grads[name], gradient), name


def test_checkpointing_follows_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    # The shape of the tiny one under the choices of a large one: those are too large to build here.
    tiny = dict(PRESETS["qwen3-tiny"].config)
    large = PRESETS["qwen3-8b"]
    monkeypatch.setitem(PRESETS, "qwen3-8b", type(large)(**{**vars(large), "config": tiny}))
    assert build_model("qwen3-8b", dtype=torch.bfloat16, seed=0).hf.is_activation_checkpointing
    quiet = build_model("qwen3-8b", dtype=torch.bfloat16, seed=0, activations=Activations())
    assert not quiet.hf.is_activation_checkpointing
    assert not build_model("qwen3-tiny", dtype=torch.bfloat16, seed=0).hf.is_activation_checkpointing


# --- checkpoints


def test_checkpoint_is_loaded(tmp_path: Path) -> None:
    folder = qwen3(tmp_path / "config")
    saved = build_model(folder, dtype=torch.float32, seed=3).hf
    saved.save_pretrained(tmp_path / "saved")
    loaded = build_model(str(tmp_path / "saved"), dtype=torch.bfloat16, seed=8, from_checkpoint=True, loss="chunked")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.hf.state_dict()[name], tensor.bfloat16()), name
    assert torch.equal(loaded.hf.model.rotary_emb.inv_freq, saved.model.rotary_emb.inv_freq)
    # Plain evaluation, as any user of transformers would load it.
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ours = build_model(str(tmp_path / "saved"), dtype=torch.float32, seed=0, from_checkpoint=True)
    tokens = tokens_for()
    torch.testing.assert_close(ours.eval()(tokens), stock.eval()(input_ids=tokens, labels=tokens).loss)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = qwen3(tmp_path)
    build_model(folder, dtype=torch.float32, seed=3).hf.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="vocabulary of 96, not 97"):
        build_model(folder, dtype=torch.float32, seed=0, from_checkpoint=True, vocab_size=97)
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 of the parameters are missing .* 'model.norm.weight'"):
        build_model(folder, dtype=torch.float32, seed=0, from_checkpoint=True)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        build_model(folder, dtype=torch.float32, seed=0, from_checkpoint=True)
