"""`toolkit doctor --parity`: a model that trains alike in all ways is told from one that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit.checkpoint import source
from toolkit.commands.doctor import doctor
from toolkit.compare import parity as parities
from toolkit.compare.parity import WAYS, Compared, Way, compare
from toolkit.errors import UserError
from toolkit.state.sharding import Flat, Place, Sharding

START = {"a": torch.zeros(4, 3), "b": torch.ones(5)}
END = {"a": torch.full((4, 3), 0.1), "b": torch.full((5,), 1.2)}


def opened(weights: dict[str, Tensor]) -> object:
    """What is asked of a checkpoint's `Source`."""
    places = tuple(Place(name, tuple(START[name].shape), 0) for name in START)
    made = Sharding(2, 1, None, (), (Flat(0, "other", 17, "float32", "fp32", {}, places),))

    class Opened:
        sharding = made

        def weights(self, name: str, start: int, stop: int) -> Tensor:
            return weights[name].reshape(-1)[start:stop]

    return Opened()


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Compared]:
    """Compares a run of the given losses and end with the reference."""

    def compared(losses: list[float], end: dict[str, Tensor]) -> Compared:
        ends = {}
        runs = {}
        for way, curve, weights in ((WAYS[0], [2.0, 1.0], END), (WAYS[1], losses, end)):
            runs[way] = tmp_path / str(way.stage)
            runs[way].mkdir(exist_ok=True)
            lines = [json.dumps({"step": i + 1, "loss": loss}) for i, loss in enumerate(curve)]
            (runs[way] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            ends[runs[way].name] = opened(weights)
        monkeypatch.setattr(source, "Source", lambda folder: ends[folder.parents[1].name])
        [one] = compare(START, runs)
        return one

    return compared


def test_the_same_run_agrees(two: Callable[..., Compared]) -> None:
    assert two([2.0, 1.0], END) == Compared(WAYS[1], 0.0, 0.0, "a")
    assert two([2.0, 1.0], END).agrees


def test_a_loss_or_a_parameter_that_differs_is_named(two: Callable[..., Compared]) -> None:
    one = two([2.0, 1.001], END)
    assert one.loss == pytest.approx(1e-3) and not one.agrees
    one = two([2.0, 1.0], END | {"b": torch.full((5,), 1.21)})
    assert (one.parameter, one.weights) == ("b", pytest.approx(0.05, rel=1e-3)) and not one.agrees
    assert two([2.0, 1.0], END | {"b": torch.full((5,), 1.2001)}).agrees


def test_what_is_not_finite_does_not_agree(two: Callable[..., Compared]) -> None:
    assert not two([2.0, float("nan")], END).agrees
    one = two([2.0, 1.0], END | {"a": torch.full((4, 3), float("nan"))})
    assert one.parameter == "a" and not one.agrees


def test_ways_cover_stages_ranks_and_accumulation_with_one_batch() -> None:
    assert {way.stage for way in WAYS} == {1, 2, 3}
    assert {way.ranks for way in WAYS} == {1, 2} and {way.accumulation for way in WAYS} == {1, 4}
    assert {way.micro_batch * way.ranks * way.accumulation for way in WAYS} == {4}


def test_a_model_that_is_none_is_one_sentence() -> None:
    with pytest.raises(UserError, match="unknown model 'qwen3-tyni'.*Did you mean 'qwen3-tiny'"):
        doctor(parity="qwen3-tyni")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"parity": "qwen3-3m", "fix": True}, "give --fix by itself"),
        ({"parity": "qwen3-3m", "ranks": 2}, "give --ranks by itself"),
        ({"parity": "qwen3-3m", "hostfile": Path("hosts")}, "give --hostfile by itself"),
        ({"parity": "qwen3-3m", "data": "absent.txt"}, "there is no data file or folder 'absent.txt'"),
        ({"data": "stdlib"}, "--data is what --parity MODEL trains on"),
    ],
)
def test_options_that_would_do_nothing_are_refused_before_anything_is_trained(
    given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parities, "parity", lambda *_: pytest.fail("a model was trained"))
    with pytest.raises(UserError, match=words):
        doctor(**given)


@pytest.mark.slow
def test_a_real_model_trains_alike_in_all_ways(tmp_path: Path) -> None:
    found = parities.parity("qwen3-tiny", "stdlib", tmp_path, lambda line: None)
    assert [one.way for one in found] == list(WAYS[1:])
    assert all(one.agrees for one in found), found


@pytest.mark.slow
def test_a_gradient_that_is_a_sum_where_it_should_be_a_mean_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second way the batch is another one."""
    monkeypatch.setattr(parities, "WAYS", (Way(2, 1, 1), Way(2, 1, 2)))
    monkeypatch.setattr(Way, "micro_batch", property(lambda way: 4))
    [one] = parities.parity("qwen3-tiny", "stdlib", tmp_path, lambda line: None)
    assert not one.agrees
