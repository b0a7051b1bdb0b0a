"""Checkpoints of rules whose states differ between parameter groups, or are of rows and columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from typer.testing import CliRunner

from toolkit.checkpoint import universal
from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.cli import app
from toolkit.commands.checkpoint import find
from toolkit.records.run import read_metrics

WORKER = Path(__file__).with_name("checkpoint_worker.py")
STEPS, STOP = 5, 3
FACTORED = "AMCS"
RULES = ("NorMuon", "Adafactor8", FACTORED)
SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 4099,
    "hidden_size": 40,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32,
}
"""Most matrices are no whole blocks."""


class World:
    """The folder of the tests, and what its launches gave."""

    said: list[str]
    trained: list[Any]
    carried: list[Any]

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text(json.dumps(SHAPE))
        texts = [f"Document {n} counts: " + " ".join(map(str, range(n, n + 15))) for n in range(30)]
        (root / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def arguments(self, run: str, rule: str, stage: int, ranks: int, *, steps: int = STEPS, **params: Any) -> list[str]:
        kept = {"state_format": "factored"} if rule == FACTORED else {}
        optimizer = {"type": rule, "params": {"lr": 2e-3, "compile": False} | kept | params}
        fixed = (
            f"--model {self.root / 'model'} --tokenizer python-4k --data {self.root / 'data.jsonl'} --seq-len 16 "
            f"--global-batch 4 --micro-batch {4 // ranks} --eval-every 0 --steps {steps} --save-every {steps} "
            f"--run-dir {self.root / run} --config amcs_zero{stage} --set"
        )
        return [*fixed.split(), f"optimizer={json.dumps(optimizer)}"]

    def carry(self, rule: str, stage: int, ranks: int, source: str, to: str, **params: Any) -> dict[str, Any]:
        unused = self.arguments("unused", rule, stage, ranks, **params)
        return {"carry": unused, "source": str(self.root / source), "to": str(self.root / to)}

    def launch(self, name: str, ranks: int, steps: list[dict[str, Any]]) -> list[Any]:
        found: list[Any] = launch(self.root / name, ranks, WORKER, {"steps": steps})[0]
        return found

    def digest(self, place: str) -> str:
        return open_checkpoint(find(self.root / place)).digest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two ranks train, uninterrupted and with a stop; then their state goes to other ranks, stages and layouts."""
    made = World(tmp_path_factory.mktemp("plugin-checkpoints"))
    steps: list[dict[str, Any]] = []
    for rule in RULES:
        cut = made.arguments(f"{rule}/cut", rule, 2, 2)
        steps += [{"run": made.arguments(f"{rule}/plain", rule, 2, 2)}, {"run": cut, "stop_at": STOP}, {"run": cut}]
    made.trained = made.launch("train", 2, steps)
    one = [made.carry(rule, 3, 1, f"{rule}/plain", f"{rule}/one-3") for rule in RULES]
    whole = {"state_format": {"v": "fp32"}}
    other = made.carry(FACTORED, 3, 1, f"{FACTORED}/plain", f"{FACTORED}/whole", **whole)
    *same, made.said = made.launch("one", 1, [*one, other | {"convert": True}])
    assert same == [[] for _ in RULES]
    two = []
    for rule in RULES:
        origin = open_checkpoint(find(made.root / rule / "one-3"))
        universal.write(origin, made.root / rule / "universal" / f"global_step{STEPS}")
        convert(origin, made.root / rule / "converted-1", stage=1, world_size=3)
        two.append(made.carry(rule, 2, 2, f"{rule}/one-3", f"{rule}/two-2"))
        two.append(made.carry(rule, 3, 2, f"{rule}/converted-1", f"{rule}/two-3"))
        two.append(made.carry(rule, 2, 2, f"{rule}/universal", f"{rule}/back") | {"convert": True})
    two.append(made.carry(FACTORED, 2, 2, f"{FACTORED}/whole", f"{FACTORED}/again") | {"convert": True})
    made.carried = made.launch("two", 2, two)
    return made


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_uninterrupted_one(world: World, rule: str) -> None:
    plain, cut = (read_metrics(world.root / rule / name / "metrics.jsonl") for name in ("plain", "cut"))
    assert [record["step"] for record in cut] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in cut] == [record["loss"] for record in plain]
    assert [record["grad_norm"] for record in cut] == [record["grad_norm"] for record in plain]
    assert world.digest(f"{rule}/plain") == world.digest(f"{rule}/cut")


@pytest.mark.parametrize("rule", RULES)
def test_other_ranks_and_stages_keep_every_state(world: World, rule: str) -> None:
    """2 -> 1 -> 2 ranks through engines, stage 2 -> 3 -> 2, and 3 ranks at stage 1 without an engine."""
    assert world.carried[3 * RULES.index(rule) :][:2] == [[], []]
    places = ("one-3", "converted-1", "two-2", "two-3")
    assert {world.digest(f"{rule}/{place}") for place in places} == {world.digest(f"{rule}/plain")}


def test_of_the_universal_layout_comes_back_what_was_there(world: World) -> None:
    """State is encoded anew there; what is not coded is the same."""
    for rule in RULES:
        before, after = (open_checkpoint(find(world.root / rule / place)) for place in ("plain", "back"))
        assert before.sharding.flats == after.sharding.flats and before.sharding.states == after.sharding.states
        for name, (index, place) in before.sharding.by_name.items():
            assert before.step_of(index) == after.step_of(index) == STEPS
            old, new = (source.states(name, 0, place.numel) | source.small(name) for source in (before, after))
            assert old.keys() == new.keys()
            for key, value in old.items():
                kept = before.sharding.flats[index].formats.get(key)  # of rows and columns of a factored one, none
                most = 0.0 if kept == "fp32" else 1e-6 if kept in ("factored", None) else 0.02
                assert (new[key] - value).norm() <= most * value.norm(), (name, key)


def test_a_second_moment_is_factored_and_made_whole_again(world: World) -> None:
    assert world.said == ["v was kept as factored and is now fp32"]
    plain, whole, again = (
        open_checkpoint(find(world.root / FACTORED / place)) for place in ("plain", "whole", "again")
    )
    seen = 0
    for name, (_, place) in plain.sharding.by_name.items():
        rows_and_columns = {f"v.{of}" for of in ("rows", "columns")} if len(place.shape) > 1 else set()
        assert set(plain.small(name)) == set(again.small(name)) == rows_and_columns and not whole.small(name)
        before, between, after = (source.states(name, 0, place.numel)["v"] for source in (plain, whole, again))
        assert torch.equal(before, between) and (after - before).norm() <= 1e-6 * before.norm()
        seen += bool(rows_and_columns)
        for key, value in plain.small(name).items():
            assert (again.small(name)[key] - value).norm() <= 1e-6 * value.norm()
    assert seen > 5


def test_states_of_rows_and_columns_are_saved_once(world: World) -> None:
    source = open_checkpoint(find(world.root / "Adafactor8" / "plain"))
    for index in range(len(source.sharding.flats)):
        first, second = (source.saved_state(rank, index).keys() for rank in range(2))
        assert first - second == {"r", "c"} and not second - first
    for name, (_, place) in source.sharding.by_name.items():
        small = source.small(name)
        rows, columns = place.shape if len(place.shape) == 2 else (1, place.numel)
        assert small["r"].shape == (rows,) and small["c"].shape == (columns,)
        assert all(value.gt(0).any() for value in small.values())
    run = CliRunner().invoke(app, ["checkpoint", "verify", str(source.folder)])
    assert run.exit_code == 0, run.output
    shown = CliRunner().invoke(app, ["checkpoint", "inspect", str(source.folder)], env={"COLUMNS": "300"})
    assert "Adafactor8: r, c" in shown.output, shown.output


def test_states_are_those_of_the_variant(world: World) -> None:
    source = open_checkpoint(find(world.root / "NorMuon" / "plain"))
    kept = {name: set(source.states(name, 0, place.numel)) for name, (_, place) in source.sharding.by_name.items()}
    momentum = {name for name, states in kept.items() if states == {"m"}}
    assert momentum == {name for name in kept if "_proj." in name}
    assert all(kept[name] == {"m", "v"} for name in kept.keys() - momentum)
    assert {name for name in kept if source.small(name)} == momentum
