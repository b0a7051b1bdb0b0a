"""Checkpoints of real ranks: the curve after a resume, other numbers of ranks, other stages, other formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch

from toolkit.checkpoint.universal import open_checkpoint
from toolkit.commands.checkpoint import find
from toolkit.records.run import read_metrics

WORKER = Path(__file__).with_name("checkpoint_worker.py")
STEPS = 10
COMPACT = ["--set", "optimizer.params.state_format=compact", "--set", "optimizer.params.weights=bf16+4"]
FP32_WEIGHTS = ["--set", "optimizer.params.weights=fp32"]
WAYS = {
    "amcs-1": ["--config", "amcs_zero1"],
    "amcs-2": ["--config", "amcs_zero2"],
    "amcs-3": ["--config", "amcs_zero3"],
    "offload-2": ["--config", "amcs_zero2_offload"],
    "offload-3": ["--config", "amcs_zero3_offload"],
    "nvme-3": ["--config", "amcs_zero3_offload", "--set", "zero_optimization.offload_optimizer.device=nvme"]
    + ["--set", "zero_optimization.offload_optimizer.nvme_path=."],
    "released": ["--config", "soam_zero2", "--set", "optimizer.params.release_gradients=true"],
    "compact": ["--config", "amcs_zero3", *COMPACT],
    # A window of two steps, so that the loss scale changes before a stop and after it.
    "fp16": ["--config", "amcs_zero2", "--set", "bf16.enabled=false", *FP32_WEIGHTS]
    + ["--set", 'fp16={"enabled": true, "initial_scale_power": 6, "loss_scale_window": 2}'],
    "fp32-3": ["--config", "amcs_zero3", "--set", "bf16.enabled=false", *FP32_WEIGHTS],
    "adamw-2": ["--config", "adamw_zero2"],
    "adamw-3": ["--config", "adamw_zero3"],
}
# Ways of every test run; the others take `make test-slow`.
USUAL = ("amcs-1", "amcs-2", "amcs-3", "offload-2")
SLOW = tuple(name for name in WAYS if name not in USUAL)
EXACT = ("loss", "lr", "grad_norm", "alpha", "skipped", "step")


def model(folder: Path, hidden: int, **more: Any) -> Path:
    """A Qwen3 with attention dropout, which draws from the random number generator at every step."""
    folder.mkdir()
    shape = {
        "model_type": "qwen3",
        "vocab_size": 4096,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "attention_dropout": 0.1,
    }
    (folder / "config.json").write_text(json.dumps(shape | more))
    return folder


class World:
    """The folder of a test session: models, data, and the arguments of its runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.whole = model(root / "whole", 64)
        self.odd = model(root / "odd", 40, vocab_size=4099)
        # A little over three steps of 12 sequences an epoch, so that ten steps pass the end of the data three times.
        texts = [f"Document {n} counts: " + " ".join(map(str, range(n, n + 15))) for n in range(30)]
        self.data = root / "data.jsonl"
        self.data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def arguments(self, run: str, way: list[str], ranks: int, *more: str, model: str = "whole") -> list[str]:
        fixed = (
            f"--model {self.root / model} --tokenizer python-4k --data {self.data} --seq-len 32 --global-batch 12 "
            f"--micro-batch {12 // ranks} --eval-every 0 --steps {STEPS} --save-every 4 --keep-last 9 "
            f"--run-dir {self.root / run}"
        )
        compiled = [] if any("adamw" in word for word in way) else ["--set", "optimizer.params.compile=false"]
        return [*fixed.split(), *way, *compiled, *more]

    def records(self, run: str) -> list[dict[str, Any]]:
        return read_metrics(self.root / run / "metrics.jsonl")

    def digest(self, place: str) -> str:
        return open_checkpoint(find(self.root / place)).digest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("checkpoints"))


def steps_of(world: World, name: str, ranks: int, steps: list[dict[str, Any]]) -> list[Any]:
    return launch(world.root / name, ranks, WORKER, {"steps": steps})[0]


def uninterrupted_and_resumed(
    world: World, names: tuple[str, ...], more: Sequence[dict[str, Any]] = ()
) -> dict[str, list[Any]]:
    """On two ranks: each way uninterrupted, and stopped after steps 3 and 7 and resumed each time; then `more`."""
    steps = []
    for name in names:
        steps.append({"run": world.arguments(f"{name}/plain", WAYS[name], 2)})
        cut = world.arguments(f"{name}/cut", WAYS[name], 2)
        steps += [{"run": cut, "stop_at": 3}, {"run": cut, "stop_at": 7}, {"run": cut}]
    results = steps_of(world, f"two-{names[0]}", 2, [*steps, *more])
    return {name: results[4 * i : 4 * i + 4] for i, name in enumerate(names)} | {"more": results[4 * len(names) :]}


SPY = """
import json, os, torch, torch._inductor.config
from toolkit.run import ranks

def note(module, args, output):
    held = {name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")}
    held["algorithms"] = torch.are_deterministic_algorithms_enabled()
    held["warn only"] = torch.is_deterministic_algorithms_warn_only_enabled()
    held["fill"] = torch.utils.deterministic.fill_uninitialized_memory
    held["compiler"] = torch._inductor.config.deterministic
    with open(f"FILE-{ranks.rank()}", "w") as file:
        json.dump(held, file)
    handle.remove()

handle = torch.nn.modules.module.register_module_forward_hook(note)
"""
REFUSED = """
import torch

torch.nn.modules.module.register_module_forward_hook(
    lambda *_: torch.zeros(2).put_(torch.tensor([1]), torch.ones(1)) and None
)
"""


@pytest.fixture(scope="module")
def two(world: World) -> dict[str, list[Any]]:
    # The last runs of their processes, which stay deterministic.
    (world.root / "spy.py").write_text(SPY.replace("FILE", str(world.root / "spied")))
    (world.root / "refused.py").write_text(REFUSED)
    more = [
        {"run": world.arguments(f"with-{name}", WAYS["amcs-2"], 2, "--deterministic", "--plugin", str(plugin))}
        for name in ("spy", "refused")
        for plugin in [world.root / f"{name}.py"]
    ]
    return uninterrupted_and_resumed(world, USUAL, more)


@pytest.fixture(scope="module")
def slow_ways(world: World) -> dict[str, list[Any]]:
    return uninterrupted_and_resumed(world, SLOW)


@pytest.mark.parametrize("name", USUAL)
def test_a_resumed_run_is_the_uninterrupted_one(world: World, two: dict[str, list[Any]], name: str) -> None:
    check_resumed(world, name, *two[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_so_it_is_with_the_other_ways(world: World, slow_ways: dict[str, list[Any]], name: str) -> None:
    check_resumed(world, name, *slow_ways[name])


def check_resumed(world: World, name: str, whole: Any, first: Any, second: Any, last: Any) -> None:
    assert (first["interrupted"], second["interrupted"], last["interrupted"]) == (True, True, False)
    assert (first["steps"], second["steps"]) == (3, 7)
    plain, cut = world.records(f"{name}/plain"), world.records(f"{name}/cut")
    assert [record["step"] for record in cut] == list(range(1, STEPS + 1))
    for a, b in zip(plain, cut, strict=True):
        for key in EXACT:
            assert a.get(key) == b.get(key), (a["step"], key)
    assert plain[-1]["loss"] < plain[0]["loss"]
    assert world.digest(f"{name}/plain") == world.digest(f"{name}/cut")
    # Noted of the step after the one that a checkpoint was begun at.
    assert [record["step"] for record in plain if "save_wait_s" in record] == [5, 9]
    # Of a stop, of the interval, of the end.
    assert {path.name for path in (world.root / name / "cut" / "checkpoints").glob("global*")} == {
        f"global_step{step}" for step in (3, 4, 7, 8, 10)
    }


def test_a_deterministic_run_has_the_same_numbers_on_a_cpu(world: World, two: dict[str, list[Any]]) -> None:
    plain, found = world.records("amcs-2/plain"), world.records("with-spy")
    for key in EXACT:
        assert [record.get(key) for record in plain] == [record.get(key) for record in found], key
    assert world.digest("amcs-2/plain") == world.digest("with-spy")
    for rank in range(2):
        assert json.loads((world.root / f"spied-{rank}").read_text()) == {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "NCCL_ALGO": "^NVLS,NVLSTree",
            "algorithms": True,
            "warn only": False,
            "fill": False,
            "compiler": True,
        }
    noted = {name: json.loads((world.root / name / "run.json").read_text()) for name in ("amcs-2/plain", "with-spy")}
    assert [run["settings"]["deterministic"] for run in noted.values()] == [False, True]


def test_an_operation_without_a_deterministic_form_is_named(two: dict[str, list[Any]]) -> None:
    refused = two["more"][1]
    assert refused.startswith("--deterministic: put_ has no deterministic implementation in torch "), refused


@pytest.mark.parametrize("name", ["amcs-2", "amcs-3"])
def test_files_are_plain_and_deepspeeds_own_script_reads_them(
    world: World, two: dict[str, list[Any]], name: str
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = world.root / name / "plain" / "checkpoints"
    for path in folder.rglob("*.pt"):
        torch.load(path, weights_only=True)
    # Every matrix is a multiple of 256 * 2 elements, else stage 3 could not be read by it.
    found = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    source = open_checkpoint(find(folder))
    for key, (_, place) in source.sharding.by_name.items():
        assert torch.equal(found[key].flatten(), source.elements(key, None, 0, place.numel).float()), key


MOVES = (
    ("amcs-2", "amcs-2"),
    ("amcs-3", "amcs-1"),
    ("amcs-1", "offload-3"),
    ("offload-2", "amcs-3"),
    ("amcs-2", "nvme-3"),
)


@pytest.mark.parametrize("ranks", [1, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))])
def test_other_ranks_stages_and_offload_resume_alike(world: World, two: dict[str, list[Any]], ranks: int) -> None:
    """Checkpoints of two ranks resume at 1, 3 and 4, at other stages, with and without offload."""
    steps = []
    for name, way in MOVES:
        source = world.root / name / "cut" / "checkpoints" / "global_step4"
        run = f"{name}/to-{way}-{ranks}"
        steps.append({"run": world.arguments(run, WAYS[way], ranks, "--resume", str(source))})
    results = steps_of(world, f"others-{ranks}", ranks, steps)
    assert all(isinstance(result, dict) for result in results), results
    for name, way in MOVES:
        plain, moved = world.records(f"{name}/plain")[4:], world.records(f"{name}/to-{way}-{ranks}")
        assert [r["step"] for r in moved] == [r["step"] for r in plain]
        assert [r["lr"] for r in moved] == [r["lr"] for r in plain]
        assert [r["alpha"] for r in moved] == [r["alpha"] for r in plain]
        # Ranks draw their dropout from generators of one state, and so for other rows of the batch.
        assert [r["loss"] for r in moved] == pytest.approx([r["loss"] for r in plain], rel=3e-3)


def test_round_trips_keep_every_code(world: World, two: dict[str, list[Any]]) -> None:
    """2 -> 1 -> 4 -> 2 ranks and stage 1 -> 3 -> 2, through engines."""
    way = WAYS["amcs-1"]
    chain = [(1, way, "amcs-1/plain"), (4, way, "chain/1"), (2, way, "chain/4")]
    for number, (ranks, config, source) in enumerate(chain):
        to = ("chain/1", "chain/4", "chain/2")[number]
        step = {"carry": world.arguments("unused", config, ranks), "source": str(world.root / source)}
        assert steps_of(world, f"carry-{number}", ranks, [step | {"to": str(world.root / to)}]) == [[]]
    stages = [
        {"carry": world.arguments("unused", WAYS["amcs-3"], 2), "source": str(world.root / "amcs-1/plain")},
        {"carry": world.arguments("unused", WAYS["amcs-2"], 2), "source": str(world.root / "chain/s3")},
    ]
    steps = [step | {"to": str(world.root / to)} for step, to in zip(stages, ("chain/s3", "chain/s2"), strict=True)]
    assert steps_of(world, "carry-stages", 2, steps) == [[], []]
    origin = world.digest("amcs-1/plain")
    assert {world.digest(f"chain/{end}") for end in ("1", "4", "2", "s3", "s2")} == {origin}
