"""Which collectives a step takes part in, in which order, and when the host needs a number from the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from ranks import launch
from torch.testing._internal.distributed.fake_pg import FakeStore
from worker import small_model

from toolkit.estimate.predict import Case, Estimator
from toolkit.optim.matrices import Phase, order, rounds
from toolkit.zero import gradients, shared_memory
from toolkit.zero.shards import Member

Results = dict[str, list[dict[str, Any]]]

# ------------------------------------------------------------------------------------------------- two real ranks


def config(stage: int, params: dict[str, Any] | None = None, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AMCS", "params": {"lr": 3e-3, "compile": False} | (params or {})},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000} | zero,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
    }


def whole(rule: str, stage: int, released: bool = False) -> dict[str, Any]:
    params = {"lr": 3e-3, "compile": False, "release_gradients": released}
    return config(stage) | {"optimizer": {"type": rule, "params": params}}


def accumulated(stage: int) -> dict[str, Any]:
    return config(stage) | {"gradient_accumulation_steps": 2}


RELEASED = {"release_gradients": True}
CASES: dict[str, dict[str, Any]] = {
    "stage-1": {"config": config(1)},
    "stage-2": {"config": config(2)},
    "stage-3": {"config": config(3), "steps": 4},  # it learns the order of modules in the first two
    **{f"accumulated-{stage}": {"config": accumulated(stage), "steps": 4} for stage in (1, 2, 3)},
    # Most of its matrices are no whole blocks, and are gathered alone or with the next ones.
    "gathered-3": {
        "config": config(3, stage3_param_persistence_threshold=0, stage3_prefetch_bucket_size=6_000),
        "steps": 4,
    },
    "hpz": {"config": config(3, zero_hpz_partition_size=2), "steps": 4},
    "overlap": {"config": config(2, overlap_comm=True) | {"timers": {"throughput": {"synchronized": True}}}},
    "unchecked": {"config": config(2) | {"bf16": {"enabled": True, "check_grad_overflow": False}}},
    "released": {"config": config(2, RELEASED)},
    "delayed": {"config": config(2, RELEASED), "delays": True},
    "released-3": {"config": config(3, RELEASED), "steps": 4},
    "delayed-3": {"config": config(3, RELEASED), "steps": 4, "delays": True},
    "poisoned": {"config": config(2, RELEASED), "poison_at": 1},
    "poisoned-delayed": {"config": config(2, RELEASED), "poison_at": 1, "delays": True},
    **{
        f"matrices-{stage}": {"config": whole(rule, stage), "steps": 4}
        for rule, stage in (("Muon8", 1), ("NorMuon", 3))
    },
    **{
        f"{way}-{rule}-{stage}": {"config": whole(rule, stage, way == "released") | {"gradient_clipping": 0.0}}
        for rule, stage in (("Muon8", 2), ("NorMuon", 3))
        for way in ("held", "released")
    },
    "delayed-Muon8-2": {"config": whole("Muon8", 2, True) | {"gradient_clipping": 0.0}, "delays": True},
    "plain": {"config": config(2, reduce_bucket_size="auto", overlap_comm="auto"), "plain": True, "steps": 1},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Results:
    worker = Path(__file__).with_name("collectives_worker.py")
    ranks = launch(tmp_path_factory.mktemp("collectives"), 2, worker, {"cases": CASES})
    return {name: [rank[name] for rank in ranks] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_call_the_same_collectives_in_the_same_order(runs: Results, name: str) -> None:
    one, other = runs[name]
    for phase in ("forward", "backward", "step"):
        assert without_sizes(one[phase]) == without_sizes(other[phase])


@pytest.mark.parametrize(
    "name", [*(f"{way}-{stage}" for stage in (1, 2, 3) for way in ("stage", "accumulated")), "gathered-3"]
)
def test_what_is_predicted_of_collectives_is_what_is_counted(runs: Results, name: str, tmp_path: Path) -> None:
    """Beside gradients and weights there are norms, of a few bytes."""
    small_model(layers=2).config.save_pretrained(tmp_path)
    case = CASES[name]["config"]
    accumulation = case.get("gradient_accumulation_steps", 1)
    asked = Case(str(tmp_path), case, 2, 2, 23, accumulation=accumulation, device="cpu", loss="plain")
    predicted = Estimator().predict(asked).wire
    assert predicted
    for rank in runs[name]:
        counted = dict(rank["wire"])
        norms = counted.pop("all-reduce") - predicted.get("all-reduce", 0)
        assert counted == {kind: size for kind, size in predicted.items() if kind != "all-reduce"}
        assert 0 <= norms <= 64


@pytest.mark.parametrize("name", ["matrices-1", "held-Muon8-2", "matrices-3"])
def test_what_is_sent_for_whole_matrices_is_as_predicted(runs: Results, name: str, tmp_path: Path) -> None:
    """What a rank has for itself is in the same tensors, and is not sent."""
    small_model(layers=2).config.save_pretrained(tmp_path)
    asked = Case(str(tmp_path), CASES[name]["config"], 2, 2, 23, device="cpu", loss="plain")
    predicted = Estimator().predict(asked)
    counted = [rank["wire"]["all-to-all"] for rank in runs[name]]
    assert predicted.sent and predicted.sent in counted, "of the rank that holds most"


def test_weights_in_a_second_partition_train_as_without_it(runs: Results) -> None:
    """hpZ: the backward pass gathers from this machine's copy."""
    for one, other in zip(runs["hpz"], runs["stage-3"], strict=True):
        assert one["losses"] == other["losses"]
        for name, weight in one["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


def without_sizes(seen: list[str]) -> list[str]:
    """Less how much each rank gets in an exchange of matrices: one may own more of them than another."""
    return [what.split()[0] if what.startswith("alltoall") else what for what in seen]


def test_matrices_go_to_their_owners_and_back_while_others_are_transformed(runs: Results) -> None:
    """The 14 hidden matrices of two layers, in several rounds."""
    layer = [64 * 40, 32 * 40, 32 * 40, 40 * 64, *[40 * 136] * 3]
    plan = rounds(2 * layer, 2)
    phases = [phase for _, phase in order(len(plan), 2)]
    seen = without_scalars(runs["matrices-1"][0]["step"])
    exchanges = [what for what in without_sizes(seen) if not what.startswith("broadcast")]
    assert exchanges == ["allreduce 1", *["alltoall_base"] * 2 * len(plan)] and len(plan) > 3
    # Of each matrix half comes to its owner, and half of it goes back to the other rank.
    got = sum(int(what.split()[1]) for rank in runs["matrices-1"] for what in rank["step"] if "alltoall" in what)
    assert got == 2 * 2 * sum(layer)
    # What NorMuon sums over ranks after the transform: rows, then sizes, before the round after it returns.
    seen = [what for what in without_sizes(without_scalars(runs["matrices-3"][0]["step"])) if "broadcast" not in what]
    calls = {Phase.SEND: ["to"], Phase.TRANSFORM: [], Phase.RETURN: ["back"], Phase.UPDATE: ["allreduce", "allreduce"]}
    want = [call for phase in phases for call in calls[phase]]
    assert len(seen) == len(want) + 1
    for what, call in zip(seen[1:], want, strict=True):
        assert what.startswith("allreduce" if call == "allreduce" else "alltoall"), (seen, want)
    assert runs["matrices-1"][0]["waits"] == runs["matrices-3"][0]["waits"] == 1


@pytest.mark.parametrize("name", ["Muon8-2", "NorMuon-3"])
def test_matrices_of_a_bucket_take_the_same_step_as_those_of_all(runs: Results, name: str) -> None:
    for held, released in zip(runs[f"held-{name}"], runs[f"released-{name}"], strict=True):
        assert any("alltoall" in what for what in released["backward"]), "eight matrices, in several buckets"
        for weight, value in held["weights"].items():
            assert torch.equal(released["weights"][weight], value), weight


def test_a_plain_deepspeed_initialize_settles_auto(runs: Results) -> None:
    for rank in runs["plain"]:
        assert rank["reduce_bucket_size"] == 4_194_304  # and not DeepSpeed's 5e8
        assert not rank["overlap_comm"]


def test_the_throughput_timer_does_not_wait_for_the_device(runs: Results) -> None:
    assert not runs["stage-2"][0]["timer_waits"]
    assert runs["overlap"][0]["timer_waits"]  # whose config asks for it


def without_scalars(seen: list[str]) -> list[str]:
    return [what for what in seen if what != "scalar"]


# Elements by hand: the parameter groups of the small model, padded to blocks of 256 for two ranks. The six matrices of
# its mlps are no whole blocks, and groups of their own. On a CPU each rank sends its half.
GATHERED = [f"broadcast {n // 2}" for n in (10_240, 15_360, 512, *[5_632] * 6, 10_240) for _ in range(2)]
REDUCED = [f"reduce {n}" for n in (10_784, 10_136, 8_560, 15_552, 15_728, 7_504)]


def test_stages_1_and_2_reduce_a_bucket_to_each_owner_and_gather_each_group_once(runs: Results) -> None:
    for name in ("stage-1", "stage-2", "overlap", "unchecked"):
        found = runs[name][0]
        assert without_scalars(found["backward"]) == REDUCED, name
        assert without_scalars(found["step"]) == ["allreduce 1", *GATHERED], name


def test_stage_3_gathers_what_stays_whole_at_once(runs: Results) -> None:
    found = runs["stage-3"][0]
    assert all(what.startswith("allreduce") for what in without_scalars(found["backward"]))
    # One norm, one gather of all parameters below the persistence threshold (here all): a half from each rank.
    assert [what.split()[0] for what in without_scalars(found["step"])] == ["allreduce", "broadcast", "broadcast"]


def test_released_gradients_take_one_small_collective_a_bucket(runs: Results) -> None:
    for name in ("released", "delayed"):
        found = without_scalars(runs[name][0]["backward"])
        assert [what for what in found if what.startswith("reduce ")] == REDUCED
        assert sum(what.startswith("allreduce") for what in found) == 3
        assert without_scalars(runs[name][0]["step"]) == GATHERED
    found = [what.split() for what in without_scalars(runs["released-3"][0]["backward"])]
    assert found and all(kind == "allreduce" for kind, _ in found)
    sizes = [int(size) for _, size in found]
    assert min(sizes[::2]) > 64 > max(sizes[1::2]), "gradients, and their norms"


def test_the_host_waits_once_a_step_for_the_norm_and_for_nothing_else(runs: Results) -> None:
    for name in ("stage-1", "stage-2", "stage-3", "overlap"):
        found = runs[name][0]
        assert found["waits"] == 1
        # The host's own copy is looked at, after the norm has been reduced and before anything is stepped on.
        assert found["step"].index("scalar") == 1 and found["step"].count("scalar") == 1, name
        assert "scalar" not in found["backward"]
    assert runs["unchecked"][0]["waits"] == 0
    assert "scalar" not in runs["unchecked"][0]["step"]


def test_waiting_for_norms_changes_no_number(runs: Results) -> None:
    """A device applies released gradients a bucket later than a CPU."""
    for at_once, later in (("released", "delayed"), ("released-3", "delayed-3")):
        assert runs[later][0]["waits"] > runs[at_once][0]["waits"]
    for at_once, later in (("released", "delayed"), ("released-3", "delayed-3"), ("poisoned", "poisoned-delayed")):
        assert runs[at_once][0]["losses"] == runs[later][0]["losses"]
        for name, weight in runs[at_once][0]["weights"].items():
            assert torch.equal(weight, runs[later][0]["weights"][name]), name
    assert not runs["poisoned-delayed"][0]["applied"] and runs["delayed"][0]["applied"]


# --------------------------------------------------------------------------------- four ranks that are not there


@pytest.fixture
def fake_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    shared_memory.leave_out()  # as in a run: else DeepSpeed builds a C++ extension, for two minutes
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    yield dist.group.WORLD
    deepspeed.comm.destroy_process_group()
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_the_reductions_of_a_bucket_are_one_call_where_the_backend_can(
    fake_ranks: Any, monkeypatch: pytest.MonkeyPatch, groups: bool, overlap: bool
) -> None:
    backend = fake_ranks._get_backend(torch.device("cpu"))
    monkeypatch.setattr(type(backend), "supports_coalescing", property(lambda _: groups))
    calls: list[str] = []
    manager, reduce = gradients._coalescing_manager, gradients.dist.reduce

    @contextmanager
    def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
        calls.append("begin")
        with manager(*args, **kwargs) as works:
            yield works
        calls.append("end")

    def counted(buffer: torch.Tensor, root: int, **kwargs: Any) -> Any:
        calls.append(f"{buffer.numel()} to {root}")
        return reduce(buffer, root, **kwargs)

    monkeypatch.setattr(gradients, "_coalescing_manager", watched)
    monkeypatch.setattr(gradients.dist, "reduce", counted)
    params = [torch.empty(1_000) for _ in range(4)]
    delivered: list[gradients.GradientFragment] = []
    reducer = gradients.Reducer(
        deliver=lambda _, pieces: delivered.extend(pieces),
        members={
            id(param): Member(param, param.shape, 0, fake_ranks, 0, offset=at, size=1_024, share=0, at=at)
            for param, at in zip(params, range(0, 4_000, 1_000), strict=True)
        },
        divisor=4,
        bucket_elements=2_000,
        dtype=torch.float32,
        overlap=overlap,
    )
    for param in params:
        reducer.add(param, torch.ones(1_000))
    reducer.flush()
    reducer.wait()
    first, second = ["1024 to 0", "976 to 1"], ["48 to 1", "1024 to 2", "928 to 3"]
    expected = [*first, *second] if not groups else ["begin", *first, "end", "begin", *second, "end"]
    assert calls == expected
    assert [(piece.offset, piece.gradient.numel()) for piece in delivered] == [(0, 1_000), (1_000, 24)]
    assert all(torch.equal(piece.gradient, torch.full_like(piece.gradient, 0.25)) for piece in delivered)
