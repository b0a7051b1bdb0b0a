"""Which component every parameter of real architectures gets, and the groups that follow from it."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, SIZES, meta_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit.errors import UserError
from toolkit.optim import AMCS, COMPONENTS, SOAM, component_of, param_groups


def tiny_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | {"use_cache": False} | changes))


def placed(groups: list[dict[str, Any]], model: nn.Module) -> dict[str, dict[str, Any]]:
    """By parameter name, the group it is in; fails on a parameter in two groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found, "in two groups"
            found[names[id(parameter)]] = group
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_its_component(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = meta_model(family)
    expected = [tuple(line.split()) for line in FAMILIES[family][2].strip().splitlines() if line]
    modules = dict(model.named_modules())
    used = set()
    for name, _ in model.named_parameters():
        fitting = [rule for rule in expected if re.fullmatch(rule[1], name)]
        assert len(fitting) == 1, f"{name}: {fitting}"
        used.update(fitting)
        assert component_of(name, modules) == fitting[0][0], name
    assert used == set(expected), "an expectation that no parameter fits"

    with caplog.at_level(logging.WARNING, "toolkit"):
        groups = placed(param_groups(model), model)
    assert not caplog.records
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        delicate = parameter.dim() == 1 or "norm" in name or name.endswith("bias")
        assert groups[name]["component"] == component_of(name, modules)
        assert groups[name].get("weight_decay") == (0.0 if delicate else None), name
        assert groups[name].get("state_format") == ("fp32" if delicate else None), name


def test_biases_of_packed_experts_are_biases_though_2d() -> None:
    model = meta_model("GPT-OSS")
    groups = placed(param_groups(model), model)
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    assert dict(model.named_parameters())[name].dim() == 2
    optimizer = AMCS(param_groups(model), alpha=0.5)
    settled = placed(optimizer.param_groups, model)[name]
    assert (groups[name]["component"], settled["weight_decay"]) == ("ffn", 0.0)
    assert set(settled["state_format"].values()) == {"fp32"}


def test_norms_of_more_dimensions_are_norms() -> None:
    class PerHeadLayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8))

    block = nn.ModuleDict({"q_scaling": PerHeadLayerNorm()})
    (group,) = param_groups(nn.ModuleDict({"self_attn": block}))
    assert (group["component"], group["weight_decay"], group["state_format"]) == ("norm", 0.0, "fp32")


def test_tied_matrix_counts_once_as_embedding() -> None:
    for tied in (True, False):
        model = tiny_model(tie_word_embeddings=tied)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (embedding is head) == tied
        groups = param_groups(model, model.parameters())
        holding = [group["component"] for group in groups for p in group["params"] if p is embedding or p is head]
        assert holding == (["embedding"] if tied else ["embedding", "head"])


def test_partitioned_matrices_are_told_by_their_whole_shape() -> None:
    """Under ZeRO stage 3 the tensor at hand is an empty shell that carries `ds_shape`."""
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4)})
    parameter: Any
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    groups = placed(param_groups(model), model)
    assert "state_format" not in groups["mlp.weight"]
    assert groups["mlp.bias"]["state_format"] == "fp32"


@pytest.mark.parametrize(
    ("layer", "component"),
    [
        (nn.LayerNorm(4), "norm"),
        (nn.RMSNorm(4), "norm"),
        (nn.Embedding(4, 4), "embedding"),
        (nn.MultiheadAttention(4, 2), "attention"),
        (type("SwiGLUFeedForward", (nn.Linear,), {})(4, 4), "ffn"),
        (type("CausalSelfAttention", (nn.Linear,), {})(4, 4), "attention"),
        (nn.Linear(4, 4), "other"),
    ],
)
def test_types_tell_where_names_do_not(layer: nn.Module, component: str) -> None:
    modules = dict(nn.ModuleDict({"z": layer}).named_modules())
    assert {component_of(f"z.{name}", modules) for name, _ in layer.named_parameters()} == {component}


def test_what_fits_nothing_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(2, 2), "adapter": nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))})
    with caplog.at_level(logging.WARNING, "toolkit"):
        groups = placed(param_groups(model), model)
    assert {name for name, group in groups.items() if group["component"] == "other"} == {
        f"adapter.{i}.{kind}" for i in range(5) for kind in ("weight", "bias")
    }
    (record,) = caplog.records
    assert "adapter.0.weight, adapter.0.bias" in record.getMessage()
    assert record.getMessage().endswith("and 2 more")
    assert "mlp" not in record.getMessage()


def test_a_component_that_the_user_gives_is_taken_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(2, 2), "adapter": nn.Linear(2, 2)})
    own = [{"params": model["adapter"].parameters(), "component": "attention"}, {"params": model["mlp"].parameters()}]
    with caplog.at_level(logging.WARNING, "toolkit"):
        groups = placed(param_groups(model, own), model)
    assert not caplog.records
    assert groups["adapter.weight"]["component"] == groups["adapter.bias"]["component"] == "attention"
    assert groups["mlp.weight"]["component"] == "ffn"


def test_a_component_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="'atention' is no component. Did you mean 'attention'?"):
        AMCS([{"params": [nn.Parameter(torch.ones(2, 2))], "component": "atention"}], alpha=0.5)


def test_parameter_given_twice() -> None:
    model = tiny_model()
    given = [*model.parameters(), model.model.norm.weight]
    with pytest.raises(UserError, match=r"parameter 'model.norm.weight' is given to the optimizer twice"):
        param_groups(model, given)
    with pytest.raises(UserError, match=r"'model.norm.weight' is given to the optimizer twice"):
        param_groups(model, [{"params": model.parameters()}, {"params": model.model.norm.weight}])


def test_parameter_of_another_model() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=r"shape \[3, 5\] given to the optimizer does not belong to the model"):
        param_groups(model, [*model.parameters(), nn.Parameter(torch.zeros(3, 5))])


def test_parameter_left_out() -> None:
    model = tiny_model()
    given = [p for name, p in model.named_parameters() if "layers.1.mlp" not in name]
    with pytest.raises(UserError, match=r"3 trainable parameters .* first is 'model.layers.1.mlp.gate_proj.weight'"):
        param_groups(model, given)


@pytest.mark.parametrize("named", [False, True])
def test_frozen_parameters_are_skipped(named: bool) -> None:
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert 0 < len(trainable) < len(list(model.parameters()))
    given = list(model.named_parameters() if named else model.parameters())
    for params in (None, given):
        groups = placed(param_groups(model, params), model)
        assert groups.keys() == trainable
    assert "embedding" not in {group["component"] for group in groups.values()}


def test_the_users_groups_keep_their_own_options() -> None:
    model = tiny_model()
    head = [model.lm_head.weight]
    attention = [p for name, p in model.named_parameters() if "self_attn" in name]
    taken = {id(p) for p in head + attention}
    rest = [p for p in model.parameters() if id(p) not in taken]
    given = [
        {"params": head, "lr": 1e-5, "weight_decay": 0.3},
        {"params": attention, "weight_decay": 0.2},
        {"params": rest},
    ]
    made = param_groups(model, given, lr=2e-4, weight_decay=0.05)
    groups = placed(AMCS(made, lr=1e-3, alpha=0.5).param_groups, model)
    assert (groups["lm_head.weight"]["lr"], groups["lm_head.weight"]["weight_decay"]) == (1e-5, 0.3)
    assert (groups["lm_head.weight"]["component"], groups["lm_head.weight"]["lr_scale"]) == ("head", 0.8)
    # A decay that the user gives for a group holds for the biases in it; one for all groups does not.
    weight, bias = (groups[f"model.layers.0.self_attn.q_proj.{kind}"] for kind in ("weight", "bias"))
    assert (weight["weight_decay"], bias["weight_decay"]) == (0.2, 0.2)
    assert set(weight["state_format"].values()) == {"8bit"}
    assert set(bias["state_format"].values()) == {"fp32"}
    assert (groups["model.norm.weight"]["lr"], groups["model.norm.weight"]["weight_decay"]) == (2e-4, 0.0)
    up = groups["model.layers.0.mlp.up_proj.weight"]
    assert (up["lr"], up["weight_decay"]) == (2e-4, 0.05)


MODEL = tiny_model()
COUNT = len(list(MODEL.parameters()))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-1, 3), min_size=COUNT, max_size=COUNT))
def test_any_split_into_groups_optimizes_every_parameter_once(owners: list[int]) -> None:
    """`owners`: the user's group of each parameter, -1 for loose ones beside the groups."""
    model = MODEL
    by_owner: dict[int, list[nn.Parameter]] = {}
    for parameter, owner in zip(model.parameters(), owners, strict=True):
        by_owner.setdefault(owner, []).append(parameter)
    given: list[Any] = [
        {"params": own, "lr": 10.0 ** -(2 + owner)} for owner, own in by_owner.items() if owner >= 0
    ] + by_owner.get(-1, [])
    optimizer = SOAM(param_groups(model, given), lr=1.0)
    groups = placed(optimizer.param_groups, model)
    modules = dict(model.named_modules())
    for (name, _), owner in zip(model.named_parameters(), owners, strict=True):
        assert groups[name]["component"] == component_of(name, modules)
        assert groups[name]["lr"] == (1.0 if owner < 0 else 10.0 ** -(2 + owner))
    assert len(groups) == COUNT


def test_rates_and_betas_follow_the_component() -> None:
    model = tiny_model()
    groups = AMCS(param_groups(model), total_steps=10).param_groups
    assert {group["component"]: group["lr_scale"] for group in groups} == {
        "embedding": 0.8,
        "attention": 1.2,
        "ffn": 1.0,
        "norm": 1.0,
        "head": 0.8,
    }
    scales = {"norm": 0.5, "ffn": 2.0}
    groups = AMCS(param_groups(model), total_steps=10, component_scales=scales).param_groups
    found = {group["component"]: group["lr_scale"] for group in groups}
    assert found == {"embedding": 0.8, "attention": 1.2, "ffn": 2.0, "norm": 0.5, "head": 0.8}
    for group in SOAM(param_groups(model)).param_groups:
        b1, rate = (0.95, 1.5e-2) if group["component"] == "ffn" else (0.9, 8e-3)
        assert group["betas"] == (b1, 0.95)
        assert group["lr"] * group["lr_scale"] == pytest.approx(rate)
    assert {group["component"] for group in groups} < set(COMPONENTS)


def test_a_plain_loop_trains() -> None:
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = 30
    optimizer = AMCS(param_groups(model), lr=1e-2, total_steps=steps, compile=False)
    losses = []
    for step in range(steps):
        starts = torch.randint(0, 64, (8, 1), generator=torch.Generator().manual_seed(step))
        tokens = (starts + torch.arange(16)) % 64
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert optimizer.report() == {"alpha": 0.0}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name == "model.embed_tokens.weight"), name


def test_compiled_modules_have_the_components_of_plain_ones() -> None:
    plain, inside = tiny_model(), tiny_model()
    for index, layer in enumerate(inside.model.layers):
        layer.mlp, layer.input_layernorm = torch.compile(layer.mlp), torch.compile(layer.input_layernorm)
        inside.model.layers[index] = torch.compile(layer)
    expected = [(g["component"], len(g["params"]), g.get("weight_decay")) for g in param_groups(plain)]
    for model in (inside, torch.compile(inside)):
        assert [(g["component"], len(g["params"]), g.get("weight_decay")) for g in param_groups(model)] == expected


def test_a_group_without_elements_is_left_out() -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4, bias=False), "other": nn.Linear(0, 4, bias=False)})
    assert [group["component"] for group in param_groups(model)] == ["ffn"]
    model["mlp"].empty = nn.Parameter(torch.zeros(0, 24))
    assert [len(group["params"]) for group in param_groups(model)] == [1]


def test_a_type_that_cannot_be_trained_is_named() -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4, bias=False, dtype=torch.complex64)})
    with pytest.raises(UserError, match=r"'mlp\.weight': trainable weights are complex64"):
        param_groups(model)
