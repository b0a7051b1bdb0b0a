"""The optimizer class: layouts, formats, groups, saving. The step that it runs: `test_step.py`, `test_streaming.py`."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.errors import UserError
from toolkit.optim import AMCS, SOAM, check_params, find_rule
from toolkit.state.codecs import BLOCK, Fp32, Root, Signed
from toolkit.state.remainders import WEIGHTS

SIZES = [(7,), (64, 64), (2, 256), (300, 1), (1, 1000), (33, 100), (3, 256), (513, 3)]


def train(optimizer_class: Any, steps: int = 10, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    parameters = [nn.Parameter(torch.randn(*size).to(dtype)) for size in SIZES]
    optimizer = optimizer_class(parameters, **kwargs)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn_like(p) * 1e-2
        optimizer.step()
    return parameters, optimizer


def test_any_layout_of_memory() -> None:
    torch.manual_seed(0)
    base = torch.randn(48, 64)
    plain, transposed = nn.Parameter(base.clone()), nn.Parameter(base.t().contiguous().t())
    assert not transposed.is_contiguous()
    g = torch.randn(48, 64)
    for p in (plain, transposed):
        p.grad = g.clone() if p is plain else g.t().contiguous().t()
        SOAM([p]).step()
    torch.testing.assert_close(plain.detach(), transposed.detach())


RESIDUAL = Signed(4, relative=True)
S4, S8 = 0.5 + 4 / BLOCK, 1 + 4 / BLOCK
"""Bytes per element of 4-bit and of 8-bit codes, with their scales."""


@pytest.mark.parametrize(
    ("rule", "state_format", "codecs", "per_element"),
    [
        (AMCS, "8bit", (Signed(8), Signed(8), Root(8)), (S8, S8, S8)),
        (AMCS, "compact", (RESIDUAL, Signed(8), Root(8)), (S4, S8, S8)),
        (AMCS, "minimal", (RESIDUAL, Signed(8), Root(4)), (S4, S8, S4)),
        (AMCS, "4bit", (RESIDUAL, Signed(4), Root(4)), (S4, S4, S4)),
        (AMCS, {"m_fast": "4bit", "v": "fp32"}, (RESIDUAL, Signed(8), Fp32()), (S4, S8, 4)),
        (SOAM, "8bit", (Signed(8), Root(8)), (S8, S8)),
        (SOAM, "compact", (Signed(4), Root(8)), (S4, S8)),
        (SOAM, "minimal", (Signed(4), Root(4)), (S4, S4)),
    ],
)
@pytest.mark.parametrize(("weights", "remainder"), [("bf16+16", 2), ("bf16+8", 1), ("bf16+4", 0.5), ("bf16", 0)])
def test_what_is_stored_of_a_matrix(
    rule: Any, state_format: Any, codecs: Any, per_element: Any, weights: str, remainder: float
) -> None:
    p = nn.Parameter(torch.zeros(512, 512, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    extra = {"alpha": 0.5} if rule is AMCS else {}
    optimizer = rule([p], state_format=state_format, weights=weights, compile=False, **extra)
    optimizer.step()
    names = [state.name for state in rule.rule.states]
    kept = optimizer.layout(optimizer.param_groups[0], torch.bfloat16)
    assert (kept.codecs, kept.remainder) == (codecs, WEIGHTS[weights])
    want = dict(zip(names, per_element, strict=True)) | ({"remainder": remainder} if remainder else {})
    assert kept.bytes_per_element() == want
    assert {key: value / p.numel() for key, value in optimizer.state_bytes().items()} == want
    parts = {key: (spec.dtype, (1024, spec.per_block)) for key, spec in kept.specs}
    held = {key: (t.dtype, tuple(t.shape)) for key, t in optimizer.state[p].items() if isinstance(t, torch.Tensor)}
    assert held == parts


def test_fp32_weights_have_no_remainder() -> None:
    for weights in (*WEIGHTS, "fp32"):
        _, optimizer = train(AMCS, steps=1, alpha=0.5, weights=weights, compile=False)
        assert not any("remainder" in held for held in optimizer.state.values())
        assert not optimizer.holds_weights()


def test_formats_per_state_and_fp32_for_one_dimension() -> None:
    matrix, vector = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(64))
    optimizer = AMCS([matrix, vector], alpha=0.5, state_format={"v": "fp32"})
    formats = [group["state_format"] for group in optimizer.param_groups]
    assert formats == [
        {"m_fast": "8bit", "m_slow": "8bit", "v": "fp32"},
        dict.fromkeys(("m_fast", "m_slow", "v"), "fp32"),
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1], "bare tensors decay alike"


def test_a_matrix_that_is_not_whole_blocks_is_a_group_of_its_own() -> None:
    """So no block belongs to two parameters, and the user's settings hold for all groups made of one."""
    shapes = [(5, 7), (16, 16), (300, 3), (10,), (2, 128)]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = AMCS([{"params": params, "lr": 0.5, "weight_decay": 0.25}], alpha=0.5)
    groups = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [[(16, 16), (2, 128)], [(5, 7)], [(300, 3)], [(10,)]]
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.5, 0.25)}


@pytest.mark.parametrize("state_format", ["compact", "minimal"])
def test_one_dimension_is_kept_exactly(state_format: str) -> None:
    matrix, vector = (nn.Parameter(torch.ones(*size, dtype=torch.bfloat16)) for size in ((64, 64), (64,)))
    optimizer = AMCS([matrix, vector], alpha=0.5, state_format=state_format, weights="bf16+4", compile=False)
    large, small = (optimizer.layout(group, torch.bfloat16) for group in optimizer.param_groups)
    assert (large.codecs[0], large.remainder) == (RESIDUAL, WEIGHTS["bf16+4"])
    assert (small.codecs, small.remainder) == ((Fp32(), Fp32(), Fp32()), WEIGHTS["bf16+16"])
    for p in (matrix, vector):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert {key for key in optimizer.state[vector] if "remainder" in key} == {"remainder", "remainder.low"}
    # One remainder byte of 16 bits in two tensors is counted once, under one name.
    assert optimizer.state_bytes()["remainder"] == 64 * 64 // 2 + 2 * BLOCK


def test_bf16_parameters_need_a_remainder() -> None:
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    with pytest.raises(UserError, match=r"weights is 'fp32', but the parameters are bf16; use 'bf16\+16'") as caught:
        SOAM([p], weights="fp32").step()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"), [("bf16+9", "Did you mean 'bf16+"), ("bf61", "Did you mean 'bf16'"), (8, "is 8,")]
)
def test_unknown_weights_are_refused(given: Any, says: str) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(4, 4))], "weights": given}]
    for make in (lambda: SOAM(groups), lambda: check_params("SOAM", {"weights": given})):
        with pytest.raises(UserError, match="weights is .* must be one of bf16") as caught:
            make()
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_release_gradients_needs_zero() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones_like(p)
    with pytest.raises(UserError, match="release_gradients works under DeepSpeed"):
        SOAM([p], release_gradients=True).step()
    assert torch.equal(p.detach(), torch.ones(4, 4))
    with pytest.raises(UserError, match="release_gradients must be true or false"):
        SOAM([p], release_gradients=1)


@pytest.mark.parametrize("seed", [-1, 0.5, True, "0"])
def test_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(UserError, match="seed must be a whole number"):
        SOAM([nn.Parameter(torch.ones(4, 4))], seed=seed)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"state_format": "compact", "weights": "bf16+4", "seed": 3, "compile": False}),
        (torch.bfloat16, {"weights": "bf16", "seed": 3, "compile": False}),
    ],
)
def test_state_dict_round_trip_continues_bit_for_bit(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    parameters, optimizer = train(AMCS, dtype=dtype, total_steps=20, **settings)
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    twin = AMCS(twins, total_steps=20, **settings)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for both in (parameters, twins):
        torch.manual_seed(11)
        for p in both:
            p.grad = torch.randn_like(p)
    optimizer.step()
    twin.step()
    for a, b in zip(parameters, twins, strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == twin.state[b].keys()
        for key, value in optimizer.state[a].items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == twin.state[b][key].dtype, "torch's own loading casts codes to float"
                assert torch.equal(value, twin.state[b][key]), key
    if settings.get("weights") == "bf16+4":
        assert optimizer.state[parameters[1]]["remainder"].count_nonzero() > 0


def test_copies_and_pickles_step_alike() -> None:
    parameters, optimizer = train(SOAM, steps=2, compile=False)
    twin = pickle.loads(pickle.dumps((parameters, optimizer)))
    copied = copy.deepcopy((parameters, optimizer))
    for tensors, each in ((parameters, optimizer), twin, copied):
        for p in tensors:
            p.grad = torch.full_like(p, 1e-2)
        each.step()
    for a, b, c in zip(parameters, twin[0], copied[0], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_hyper_parameter_given_twice_is_refused() -> None:
    with pytest.raises(TypeError, match="twice"):
        SOAM([nn.Parameter(torch.ones(2, 2))], 1e-3, lr=2e-3)


def test_loading_another_format_is_refused() -> None:
    _, optimizer = train(SOAM, steps=1)
    _, other = train(SOAM, steps=1, state_format="fp32")
    with pytest.raises(ValueError, match="state_format"):
        optimizer.load_state_dict(other.state_dict())


def test_loading_other_weights_is_refused() -> None:
    """The codes of 8 bits are no codes of 4 bits, and without them the weights would change."""
    _, optimizer = train(SOAM, steps=1, dtype=torch.bfloat16, compile=False)
    for weights in ("bf16+4", "bf16+16", "bf16"):
        _, other = train(SOAM, steps=1, dtype=torch.bfloat16, weights=weights, compile=False)
        with pytest.raises(ValueError, match="weights bf16"):
            optimizer.load_state_dict(other.state_dict())


def test_scheduler_that_overwrites_lr_keeps_component_rates() -> None:
    p = nn.Parameter(torch.zeros(16, 16))
    optimizer = AMCS([{"params": [p], "component": "attention"}], lr=1e-3, alpha=1.0, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 5e-4
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((16, 16), -1.2 * 5e-4), rtol=1e-2, atol=0.0)


def test_torch_schedulers_and_closure_work() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = SOAM([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 16.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_betas_that_a_scheduler_broke_are_named() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = AMCS([p], alpha=0.5)
    optimizer.param_groups[0]["betas"] = (0.9, 0.95)  # OneCycle with cycle_momentum does this
    p.grad = torch.ones_like(p)
    with pytest.raises(UserError, match="betas"):
        optimizer.step()


def test_parameters_without_gradient_are_left_alone() -> None:
    p, frozen = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones_like(p)
    optimizer = SOAM([p, frozen])
    optimizer.step()
    assert torch.equal(frozen.detach(), torch.ones(4, 4))
    assert frozen not in optimizer.state


def test_signature_names_every_hyper_parameter() -> None:
    parameters = inspect.signature(AMCS).parameters
    assert list(parameters)[:6] == ["params", "lr", "betas", "eps", "weight_decay", "total_steps"]
    assert parameters["lr"].default == 6e-4
    assert inspect.signature(SOAM).parameters["lr"].default == 8e-3
    assert SOAM([nn.Parameter(torch.ones(2, 2))], 1e-3).param_groups[0]["lr"] == 1e-3


def test_names_resolve_in_any_case() -> None:
    assert find_rule("amcs") is AMCS
    assert find_rule("AdamW") is None
    check_params("SOAM", {"lr": "auto", "betas": [0.9, 0.95]})
    with pytest.raises(UserError, match="Did you mean 'lr'"):
        check_params("SOAM", {"lrr": 1e-3})


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2], ids=lambda d: str(d)[6:]
)
def test_types_that_would_train_wrongly_are_refused(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(300, 2).to(dtype))
    for given in ([p], [("blocks.0.weight", p)], [{"params": [p]}]):
        with pytest.raises(UserError, match=f"{str(dtype).removeprefix('torch.')}, but must be one of float32"):
            SOAM(given)
    with pytest.raises(UserError, match=r"blocks\.0\.weight"):
        SOAM([("blocks.0.weight", p)])


def test_frozen_parameters_of_any_type_are_left_alone() -> None:
    frozen = [torch.zeros(4, 4).to(kind) for kind in (torch.int8, torch.complex64, torch.bool, torch.float8_e4m3fn)]
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = SOAM([p, *(nn.Parameter(x, requires_grad=False) for x in frozen)], compile=False)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p != 1).all()
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_sparse_gradient_is_refused_before_any_weight_changes() -> None:
    p, embedding = nn.Parameter(torch.ones(4, 4)), nn.Embedding(4, 4, sparse=True)
    optimizer = SOAM([p, embedding.weight], compile=False)
    (p.sum() + embedding(torch.tensor([1])).sum()).backward()
    with pytest.raises(UserError, match="sparse"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(4, 4))


def test_gradients_of_another_type_than_the_weights() -> None:
    exact = torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        p = nn.Parameter(torch.ones(4, BLOCK))
        p.grad_dtype = dtype
        p.grad = exact.to(dtype)
        SOAM([p], compile=False).step()
        made.append(p.detach())
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_sharded_tensors_of_others_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        sharded = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (2,)), [Replicate()])
        with pytest.raises(UserError, match="is a DTensor"):
            SOAM([nn.Parameter(sharded)])
    finally:
        torch.distributed.destroy_process_group()


def test_a_parameter_without_elements_alone_in_its_group() -> None:
    empty, p = nn.Parameter(torch.zeros(0, 8)), nn.Parameter(torch.ones(4, 4))
    optimizer = SOAM([{"params": [empty]}, {"params": [p]}], compile=False)
    empty.grad, p.grad = torch.zeros_like(empty), torch.ones_like(p)
    optimizer.step()
    assert (p != 1).all()
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_missing_number_of_steps_is_found_by_the_constructor() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    for settings, group in (({}, {}), ({"alpha": 0.5}, {"alpha": "linear"})):
        with pytest.raises(UserError, match="total_steps is required"):
            AMCS([{"params": [p], **group}], **settings)


def test_a_saved_state_without_its_count_is_named() -> None:
    parameters, optimizer = train(SOAM, steps=1, compile=False)
    saved = optimizer.state_dict()
    del saved["state"][0]["step"]
    with pytest.raises(ValueError, match="lacks 'step'"):
        SOAM(parameters, compile=False).load_state_dict(saved)


def test_bits_of_saved_weights_are_not_dropped() -> None:
    _, optimizer = train(SOAM, steps=1, dtype=torch.bfloat16, compile=False)
    parameters, other = train(SOAM, steps=0, compile=False)
    assert parameters[0].dtype == torch.float32
    with pytest.raises(ValueError, match="has remainder, .*not keep for float32 weights"):
        other.load_state_dict(optimizer.state_dict())
