"""Predictions against sums done by hand, against measured figures, and against a real pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from toolkit import models
from toolkit.config import DeepSpeedSettings, load_config
from toolkit.errors import UserError
from toolkit.estimate.dry_run import DryRun, dry_run, scaled
from toolkit.estimate.optimizer_memory import optimizer_memory
from toolkit.estimate.predict import Case, Estimator, alternatives, assumed_context, variants
from toolkit.estimate.together import Flat, Part, step_together
from toolkit.memory.trace import StepTrace
from toolkit.models import tiled
from toolkit.models.build import blueprint
from toolkit.optim import RULES, Rule, State, as_optimizer
from toolkit.optim.rules.adafactor8 import Adafactor8Rule
from toolkit.optim.rules.muon8 import Muon8Rule
from toolkit.optim.rules.normuon import NorMuonRule
from toolkit.optim.statistics import CHUNK
from toolkit.records import categories as c
from toolkit.records.activations import Activations
from toolkit.state.sharding import held

TINY, MIDDLE = "qwen3-tiny", "qwen3-134m"
SCALE = 4 / 256
BUCKET = 4_194_304


def config(optimizer: str, stage: int, offload: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    zero |= {"overlap_comm": False, "sub_group_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}
    zero |= {"stage3_max_live_parameters": 4 * BUCKET, "stage3_max_reuse_distance": 4 * BUCKET}
    zero |= {"stage3_param_persistence_threshold": 16_384} | (offload or {})
    optimizer_params = {"lr": 1e-4} | params
    if optimizer == "AdamW":
        optimizer_params |= {"torch_adam": True, "fused": True}
    return {
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": optimizer, "params": optimizer_params},
        "zero_optimization": zero,
    }


def case(settings: dict[str, Any], world_size: int = 1, *, model: str = TINY, tokens: int = 8, **more: Any) -> Case:
    defaults = {"device": "cpu", "activations": Activations(), "loss": "plain"}
    return Case(model, settings, world_size, 1, tokens, **(defaults | more))


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return Estimator()


def numels(model: str) -> tuple[int, int]:
    """Parameters in matrices and in vectors."""
    shapes = [p.shape for p in blueprint(model, dtype=torch.bfloat16).parameters()]
    return sum(s.numel() for s in shapes if len(s) > 1), sum(s.numel() for s in shapes if len(s) == 1)


@pytest.mark.parametrize(
    ("rule", "state_format", "weights", "states", "each"),
    [
        ("AMCS", "8bit", "bf16+8", 3, 1 + 3 * (1 + SCALE)),
        ("AMCS", "compact", "bf16+4", 3, 0.5 + 2.5 + 3 * SCALE),
        ("AMCS", "minimal", "bf16+4", 3, 0.5 + 2 + 3 * SCALE),
        ("SOAM", "8bit", "bf16+16", 2, 2 + 2 * (1 + SCALE)),
        ("SOAM", "8bit", "bf16", 2, 2 * (1 + SCALE)),
        ("SOAM", "compact", "bf16+4", 2, 0.5 + 1.5 + 2 * SCALE),
        ("AdamW", "", "", 2, 4 + 8),
    ],
)
@pytest.mark.parametrize("ranks", [1, 4])
def test_bytes_between_steps_at_stage_2(
    estimator: Estimator, rule: str, state_format: str, weights: str, states: int, each: float, ranks: int
) -> None:
    params = {} if rule == "AdamW" else {"state_format": state_format, "weights": weights}
    held = dict(estimator.predict(case(config(rule, 2, **params), ranks)).resident)
    matrices, vectors = numels(TINY)
    # 1-D parameters keep fp32 state and 16 bits of remainder.
    of_vector = each if rule == "AdamW" else 2 + 4 * states
    buffers = 2 * 4 * 32  # rotary frequencies
    assert held.pop(c.WEIGHTS) == 2 * (matrices + vectors) + buffers
    assert sum(held.values()) == pytest.approx((each * matrices + of_vector * vectors) / ranks, rel=2e-3)


# Bytes per parameter of Qwen3-134M, measured by tests/benchmarks/memory.py: docs/benchmarks/README.md.
MEASURED = [
    ("AMCS", {"state_format": "8bit", "weights": "bf16+8"}, 2, 1, 8.06),
    ("AMCS", {"state_format": "compact", "weights": "bf16+4"}, 2, 1, 7.06),
    ("AMCS", {"state_format": "8bit", "weights": "fp32"}, 2, 1, 11.06),
    ("AMCS", {"state_format": "compact", "weights": "bf16+4", "release_gradients": True}, 2, 1, 5.46),
    ("SOAM", {"state_format": "8bit", "weights": "bf16+8"}, 2, 1, 7.04),
    ("AdamW", {}, 2, 1, 22.00),
    ("AMCS", {"state_format": "8bit", "weights": "bf16+8"}, 1, 2, 5.39),
    ("AMCS", {"state_format": "minimal", "weights": "bf16+4"}, 2, 2, 4.64),
    ("AMCS", {"state_format": "8bit", "weights": "bf16+8"}, 3, 2, 4.90),
    ("SOAM", {"state_format": "compact", "weights": "bf16+4"}, 3, 2, 3.90),
]


@pytest.mark.parametrize(("rule", "params", "stage", "ranks", "measured"), MEASURED)
def test_the_predicted_peak_is_the_measured_one(
    estimator: Estimator, rule: str, params: dict[str, Any], stage: int, ranks: int, measured: float
) -> None:
    found = estimator.predict(case(config(rule, stage, **params), ranks, model=MIDDLE))
    assert found.peak / found.setup.parameters == pytest.approx(measured, rel=0.01)


def test_every_phase_adds_up_and_the_timeline_holds_the_peak(estimator: Estimator) -> None:
    found = estimator.predict(case(config("AMCS", 2), 2, tokens=64))
    assert {phase.name for phase in found.phases} == {c.FORWARD, c.BACKWARD, c.REDUCE, c.STEP}
    for phase in found.phases:
        assert sum(phase.held.values()) == phase.peak
    at = [sum(values) for values in zip(*found.timeline.held.values(), strict=True)]
    assert max(at) == found.peak == max(phase.peak or 0 for phase in found.phases)
    assert found.timeline.spans[-1].stop == len(at)


def test_a_pass_holds_what_the_allocator_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run of a pass against the pass itself, byte by byte, whatever is kept of activations."""
    models.cpu_matmul.install()  # as `toolkit.register` does it: the dry run counts on it
    monkeypatch.setattr(tiled, "TILE", 64)  # of 96 tokens
    kept = ("full", "checkpoint", "checkpoint:2", "full chat", "checkpoint", "checkpoint,tiled", "tiled", "full chat")
    for given, loss_name in zip(kept, 4 * ["plain"] + 4 * ["chunked"], strict=True):
        words, _, chat = given.partition(" ")
        size = 192 if chat else 48  # of a mask that matters
        settings: dict[str, Any] = {"activations": Activations.read(words), "loss": loss_name}
        shape: Any = {"micro_batch": 2, "seq_len": size, "conversations": bool(chat)}
        run = dry_run(TINY, dtype=torch.bfloat16, device="cpu", **shape, **settings)
        model = models.build_model(TINY, dtype=torch.bfloat16, seed=0, **settings).train()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        tokens = torch.zeros(2, size + 1, dtype=torch.int64)
        tokens = torch.stack([tokens, tokens, (tokens + 1).cumsum(1) % 70], dim=1) if chat else tokens
        model(tokens).backward()
        weights = [(c.WEIGHTS, name, p.data) for name, p in model.named_parameters()]
        with StepTrace(model, model.hf.get_output_embeddings(), lambda x=weights: x, on_gpu=False) as trace:
            trace.phase(c.FORWARD)
            loss = model(tokens)
            trace.phase(c.BACKWARD)
            loss.backward()
        own = sum(tensor.nbytes for *_, tensor in weights)
        for phase, expected in zip(trace.curve.by_phase(), run.storages.curve().by_phase(), strict=True):
            assert phase.peak and phase.peak - own == pytest.approx(expected.peak, rel=0.002, abs=65_536)


def test_checkpointing_keeps_the_input_of_a_block_only(estimator: Estimator) -> None:
    plain = estimator.predict(case(config("AMCS", 2), tokens=128))
    small = estimator.predict(case(config("AMCS", 2), tokens=128, activations=Activations(checkpoint=True)))
    assert small.per_block["kept"] == 128 * 256 * 2  # tokens x hidden size x bf16
    assert plain.per_block["kept"] > 10 * small.per_block["kept"]
    assert small.peak < plain.peak


def test_sizes_are_linear_in_the_micro_batch() -> None:
    def of(size: int, loss: str) -> DryRun:
        return dry_run(TINY, dtype=torch.bfloat16, micro_batch=size, seq_len=32, device="cuda", loss=loss)

    for loss in ("plain", "chunked"):
        guess = scaled(of(2, loss), of(3, loss), 50)
        assert guess is not None
        sizes = ([one.bytes for one in run.storages.lifetimes] for run in (guess, of(50, loss)))
        assert next(sizes) == next(sizes)
    assert scaled(of(2, "plain"), of(3, "chunked"), 5) is None


def test_variants_of_attention_and_loss() -> None:
    heads, tokens = 4, 512
    found = variants(case(config("AMCS", 2), tokens=tokens, device="cuda"))
    # Eager attention keeps at least the bf16 probabilities of every head.
    assert found["kept, eager attention"] - found["kept, flash attention"] >= heads * tokens * tokens * 2
    assert found["kept, with checkpointing"] == tokens * 256 * 2
    assert found["logits, plain loss"] > tokens * 4096 * 4
    assert found["logits, chunked loss"] < found["logits, plain loss"]


def test_accumulation_keeps_gradients_between_micro_batches(estimator: Estimator) -> None:
    for stage, ranks, share in ((2, 1, 1), (1, 1, 1), (2, 2, 2), (1, 2, 1)):
        one = estimator.predict(case(config("AMCS", stage), ranks))
        many = estimator.predict(case(config("AMCS", stage), ranks, accumulation=4))
        forward = {phase.name: phase.held.get(c.GRADIENTS, 0) for phase in many.phases}[c.FORWARD]
        assert forward == pytest.approx(2 * many.setup.parameters / share, rel=0.35 if share > 1 else 0.01)
        assert one.phases[0].held.get(c.GRADIENTS, 0) == 0


def test_offload_moves_state_to_the_host(estimator: Estimator) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    there = estimator.predict(case(config("AMCS", 2, offload), device="cuda"))
    here = estimator.predict(case(config("AMCS", 2), device="cuda"))
    parameters = here.setup.parameters
    assert "m_fast" in here.resident and not here.host
    assert set(there.resident) == {c.WEIGHTS}
    assert sum(there.host.values()) / parameters == pytest.approx(2 + 2 + 1 + 3.05, rel=0.01)
    assert there.peak < here.peak
    # On a CPU both are one memory.
    merged = estimator.predict(case(config("AMCS", 2, offload)))
    assert not merged.host and merged.peak / parameters > 10


def test_nvme_holds_what_is_offloaded_there(estimator: Estimator) -> None:
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}
    found = estimator.predict(case(config("AdamW", 3, offload), device="cuda"))
    assert set(found.nvme) == {c.MASTER, "exp_avg", "exp_avg_sq", c.GRADIENTS}
    assert sum(found.nvme.values()) / found.setup.parameters == pytest.approx(12 + 4, rel=0.01)


def test_stage_3_gathers_no_more_than_the_model(estimator: Estimator) -> None:
    alone = estimator.predict(case(config("AMCS", 3)))
    shared = estimator.predict(case(config("AMCS", 3), 2))
    assert all(c.GATHERED not in phase.held for phase in alone.phases)
    most = max(phase.held.get(c.GATHERED, 0) for phase in shared.phases)
    size = 2 * shared.setup.parameters
    # One buffer, and each weight cut out of it.
    assert size < most <= 2.01 * size
    assert shared.resident[c.WEIGHTS] == pytest.approx(alone.resident[c.WEIGHTS] / 2, rel=0.01)


def test_a_rule_of_the_users_is_counted_from_its_declaration(estimator: Estimator) -> None:
    class OneState(Rule):
        """Momentum."""

        states: ClassVar[tuple[State, ...]] = (State("momentum"),)
        lr: float = 1e-3

    as_optimizer(OneState)
    try:
        found = estimator.predict(case(config("OneState", 2, state_format="8bit", weights="bf16+8")))
        matrices, vectors = numels(TINY)
        assert found.resident["momentum"] == pytest.approx(matrices + 4 * vectors, rel=1e-3)
        assert found.resident[c.SCALES] == pytest.approx(SCALE * matrices, rel=1e-3)
    finally:
        del RULES["OneState"]


def test_states_of_rows_and_columns_are_whole_on_every_rank(estimator: Estimator) -> None:
    shapes = [p.shape for p in blueprint(TINY, dtype=torch.bfloat16).parameters()]
    for stage, ranks in ((1, 1), (2, 4), (3, 4)):
        found = estimator.predict(case(config("Adafactor8", stage), ranks))
        # A vector is one row.
        assert found.resident["r"] == 4 * sum(s[0] if len(s) > 1 else 1 for s in shapes)
        assert found.resident["c"] == 4 * sum(s[1] if len(s) > 1 else s[0] for s in shapes)
        assert found.sent == 0


def test_a_matrix_goes_to_its_owner_and_back_in_fp32() -> None:
    matrix, half = 512 * 1024, 512 * 512
    sent = {}
    for ranks in (1, 2):
        for rank in range(ranks):
            fragment = held(rank, matrix, size=matrix // ranks)
            flat = Flat(Muon8Rule, (Part(0, (512, 1024), matrix, fragment),), 3.0)
            found = step_together([flat], ranks=ranks, rank=rank, device="cpu")
            send, transform, back, update = found.moments
            sent[ranks, rank] = found.sent
            assert [moment.used for moment in found.moments] == [(), (), (), (0,)]
            # The matrix, and what Newton-Schulz takes: one more and three squares, or two more and two squares.
            most = 4 * matrix + max(4 * matrix + 12 * 512**2, 8 * matrix + 8 * 512**2) if rank == 0 else 0
            assert transform.bytes == most
            # Halves go through a buffer of one stretch, two in a row, before they are sent.
            held_here, owned = 4 * matrix // ranks, 4 * matrix if ranks == 2 and rank == 0 else 0
            assert send.bytes == held_here + max(min(held_here, 4 * CHUNK), owned)
            assert back.bytes == held_here + owned
            assert update.bytes == held_here + max(min(held_here, 4 * CHUNK), owned)
            assert send.exchanged == transform.exchanged == (held_here + owned if ranks == 2 else 0)
    assert sent == {(1, 0): 0, (2, 0): 4 * half, (2, 1): 4 * half}


def test_means_of_a_transformed_matrix_are_found_in_its_round() -> None:
    rows, columns = 16, 2**20
    numel = rows * columns
    flat = Flat(NorMuonRule, (Part(0, (rows, columns), numel, held(0, numel, size=numel)),), 3.0)
    *_, found = step_together([flat], ranks=1, rank=0, device="cpu").moments
    *_, plain = step_together([Flat(Muon8Rule, flat.parts, 3.0)], ranks=1, rank=0, device="cpu").moments
    assert found.what == "whole matrices" and found.used == (0,)
    # A mean of each row and one of the matrix, and rows beside the matrix wherever elements are needed.
    assert plain.bytes < found.bytes < plain.bytes + 4 * 4 * CHUNK


@pytest.mark.parametrize("shape", [(8, 64, 96), (8, 96, 64)])
def test_of_a_stack_each_matrix_is_transformed_by_itself(shape: tuple[int, int, int]) -> None:
    count, numel = shape[0], 8 * 64 * 96
    flat = Flat(Muon8Rule, (Part(0, shape, numel, held(0, numel, size=numel)),), 3.0)
    _, transform, _, _ = step_together([flat], ranks=1, rank=0, device="cpu").moments
    one, square = 4 * numel // count, 4 * 64**2
    assert transform.bytes == 4 * numel + max(one + 3 * square, 2 * one + 2 * square, one * 3 if shape[1] > 64 else 0)


def test_rounds_before_and_after_hold_what_is_on_its_way() -> None:
    """Of four equal matrices in two ranks' rounds of two, the peak is where one of the middle rounds is transformed."""
    numel = 512 * 1024
    parts = tuple(Part(n, (512, 1024), numel, held(0, numel, size=numel // 2)) for n in range(8))
    found = step_together([Flat(Muon8Rule, parts, 3.0)], ranks=2, rank=0, device="cpu").moments
    alone = step_together([Flat(Muon8Rule, parts[:2], 3.0)], ranks=2, rank=0, device="cpu").moments
    one = max(moment.bytes for moment in alone)
    assert max(moment.bytes for moment in found) == one + 2 * (4 * numel + 4 * numel)
    assert max(moment.exchanged for moment in found) == 3 * (4 * numel + 4 * numel)


def test_a_measuring_pass_holds_two_stretches_of_each_buffer() -> None:
    rows, columns = 4096, 1024  # four stretches, each of whole rows
    numel = rows * columns
    flat = Flat(Adafactor8Rule, (Part(0, (rows, columns), numel, held(0, numel, size=numel)),), 2.0)
    first, second, update = step_together([flat], ranks=1, rank=0, device="cpu").moments
    lines, blocks = rows + columns, CHUNK // 256
    # Two results by element and one by block, with how many lanes count; sums of all three.
    assert first.bytes == 4 * (2 * 2 * CHUNK + 2 * blocks) + 8 * (lines + 1)
    # r and c go in, laid out in whole rows first, and what was found by block; out come two results by block.
    assert second.bytes == 4 * (2 * 2 * CHUNK + CHUNK + (1 + 2 + 1) * blocks) + 4 * (lines + 1) + 8 * 2
    assert update.bytes == 4 * (2 * 2 * CHUNK + CHUNK + 3 * blocks) + 4 * (lines + 3)
    assert (first.used, second.used, update.used) == ((), (), (0,))


def test_optimizers_of_torch_are_tried_on_a_small_tensor() -> None:
    model = blueprint(TINY, dtype=torch.bfloat16)

    def states(kind: str, **params: Any) -> dict[str, float]:
        config = {"optimizer": {"type": kind, "params": {"lr": 0.1} | params}}
        [group] = optimizer_memory(model, DeepSpeedSettings.read(config)).groups
        return dict(group.per_element)

    assert states("SGD") == {}
    assert states("SGD", momentum=0.9) == {"momentum_buffer": 4.0}
    assert states("NAdam") == {"exp_avg": 4.0, "exp_avg_sq": 4.0}
    assert states("Adam") == states("AdamW", torch_adam=True) == {"exp_avg": 4.0, "exp_avg_sq": 4.0}
    assert states("Lion") == {"exp_avg": 4.0}
    # ZeRO hands flat tensors to the optimizer: nothing to factorise.
    assert states("Adafactor") == {"variance": 4.0}
    for unknown in ("OneBitAdam", "LBFGS", "SparseAdam"):
        with pytest.raises(UserError, match=unknown):
            states(unknown)
    with pytest.raises(UserError, match="no optimizer.type"):
        optimizer_memory(model, DeepSpeedSettings())


def test_auto_and_what_is_not_modelled_are_said(estimator: Estimator) -> None:
    settings = config("AMCS", 2)
    settings["zero_optimization"] |= {"param_persistence_threshold": "auto", "round_robin_gradients": True}
    settings["zero_optimization"] |= {"reduce_bucket_size": "auto"}  # which has a rule
    remarks = estimator.predict(case(settings)).remarks
    assert any("zero_optimization.param_persistence_threshold" in remark and "default" in remark for remark in remarks)
    assert not any("reduce_bucket_size" in remark for remark in remarks)
    assert any("round_robin_gradients is not modelled" in remark for remark in remarks)
    with pytest.raises(UserError, match="stage"):
        case(settings | {"zero_optimization": {"stage": "auto"}})


def test_more_is_assumed_outside_the_allocator_where_ranks_talk(estimator: Estimator) -> None:
    sizes = [assumed_context(ranks) for ranks in (1, 2, 4, 8, 16, 512)]
    assert sizes == [1_000_000_000, 1_400_000_000, 1_800_000_000, 2_600_000_000, 2_600_000_000, 2_600_000_000]
    case = Case("qwen3-tiny", load_config("amcs_zero2"), 8, 1, 64, device="cuda")
    found = estimator.predict(case)
    assert found.context == assumed_context(8) and any("2.60 GB are assumed" in remark for remark in found.remarks)


def test_the_old_spelling_of_zero(estimator: Estimator) -> None:
    old = case(config("AMCS", 2) | {"zero_optimization": True}, 2)
    predicted = estimator.predict(old)
    assert predicted.setup.stage == 1 and estimator.changes(old, predicted.peak)


def test_what_would_change_is_what_those_settings_hold(estimator: Estimator) -> None:
    start = case(config("AdamW", 2), 2, tokens=512)
    found = estimator.predict(start)
    assert found.changes == []
    found.changes = estimator.changes(start, found.peak)
    assert found.changes == sorted(found.changes, key=lambda change: -change.saves)
    assert {"zero_optimization.stage 3", "optimizer.type AMCS (8bit)", "--activations checkpoint"} <= {
        change.change for change in found.changes
    }
    offers = dict(alternatives(start))
    for said in found.changes:
        assert said.peak == estimator.peak(offers[said.change]) and said.saves == found.peak - said.peak
    # What is left out would save next to nothing.
    for words in offers.keys() - {said.change for said in found.changes}:
        assert abs(found.peak - estimator.peak(offers[words])) < 0.005 * found.peak
    offered = {words for words, _ in alternatives(replace(start, config=config("AMCS", 2, release_gradients=True)))}
    assert "zero_optimization.stage 3" in offered


def test_a_70b_model_is_estimated_on_the_meta_device(tmp_path: Any) -> None:
    """The shape of a 70B Llama; nothing of its size is allocated."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "vocab_size": 128_256}
    LlamaConfig(**shape, num_attention_heads=64, num_key_value_heads=8).save_pretrained(tmp_path)
    found = Estimator().predict(
        Case(str(tmp_path / "config.json"), config("AMCS", 3), 64, 1, 2048, activations=Activations(checkpoint=True))
    )
    assert found.setup.parameters == 70_553_706_496
    assert found.resident[c.WEIGHTS] == pytest.approx(2 * 70.55e9 / 64, rel=0.001)
    assert 6e9 < found.peak < 30e9
