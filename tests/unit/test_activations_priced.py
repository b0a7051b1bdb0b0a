"""What is kept of activations: priced, offered, and read from runs of before."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from report_runs import write_run
from small_models import qwen3

from toolkit.config import load_config
from toolkit.errors import UserError
from toolkit.estimate import predict
from toolkit.estimate.predict import Case, Estimator, alternatives, offered_activations
from toolkit.estimate.recommend import MARGIN, Candidate, recommend
from toolkit.models import tiled
from toolkit.records import categories as c
from toolkit.records.activations import Activations
from toolkit.report import build_report

TINY = "qwen3-tiny"


def case(*, tokens: int = 8, **more: Any) -> Case:
    return Case(TINY, load_config("amcs_zero2"), 1, 1, tokens, **({"device": "cpu", "loss": "plain"} | more))


def test_inputs_of_blocks_lie_on_the_host_of_a_gpu_and_two_of_them_on_it() -> None:
    one = 2048 * 256 * 2  # tokens x hidden size x bf16, a power of two
    at = {
        words: Estimator().predict(case(tokens=2048, device="cuda", activations=Activations.read(words)))
        for words in ("checkpoint", "offload", "checkpoint:3,offload")
    }
    assert {words: found.host for words, found in at.items()} == {
        "checkpoint": {},
        "offload": {c.ACTIVATIONS: 4 * one},
        "checkpoint:3,offload": {c.ACTIVATIONS: 3 * one},
    }
    # At the loss the last input alone has not been let go.
    assert at["checkpoint"].peak - at["offload"].peak == 3 * one
    with pytest.raises(UserError, match="on a CPU the host is the device"):
        Estimator().predict(case(activations=Activations.read("offload")))


def test_what_is_offered_of_activations_fits_model_and_device(tmp_path: Path) -> None:
    assert [str(one) for one in offered_activations(TINY, "cuda", None)] == [
        *("full", "checkpoint", "checkpoint,tiled", "offload", "offload,tiled")
    ]
    assert [str(one) for one in offered_activations(TINY, "cpu", None)] == ["full", "checkpoint", "checkpoint,tiled"]
    transformers.GPT2Config().save_pretrained(tmp_path)
    assert [str(one) for one in offered_activations(str(tmp_path), "cuda", None)] == ["full", "checkpoint", "offload"]
    start = case(tokens=1024, device="cuda", activations=Activations(checkpoint=True))
    words = [words for words, _ in alternatives(start)]
    assert {"--activations checkpoint,tiled", "--activations offload", "--activations offload,tiled"} <= set(words)
    assert "--activations checkpoint" not in words and "--activations full" not in words


def test_a_budget_is_priced_as_blocks_that_hold_about_as_much() -> None:
    estimator = Estimator()
    at = {
        words: estimator.predict(case(tokens=256, activations=Activations.read(words)))
        for words in ("full", "checkpoint:3", "checkpoint", "budget:1", "budget:0.3", "budget:0")
    }
    assert [at[words].peak for words in ("budget:1", "budget:0.3", "budget:0")] == [
        at[words].peak for words in ("full", "checkpoint:3", "checkpoint")
    ]
    assert str(at["budget:0.3"].setup.activations) == "budget:0.3"
    assert "--activations budget:0.3 is priced as checkpoint:3: " in at["budget:0.3"].remarks[-1]
    assert at["full"].remarks == at["checkpoint:3"].remarks == []


def test_tiles_are_not_scaled_with_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """More sequences make more tiles, not larger ones."""
    monkeypatch.setattr(tiled, "TILE", 256)
    monkeypatch.setattr(predict, "TILE", 256)
    many = replace(case(tokens=64, activations=Activations(tiled=True)), micro_batch=8)
    assert Estimator(several=True).peak(many) == Estimator().peak(many)


def holds(needs: int) -> int:
    """The memory of which a plan takes so much at most."""
    return math.ceil(needs / (1 - MARGIN))


def test_a_plan_tries_slower_activations_where_faster_ones_do_not_fit(tmp_path: Path) -> None:
    # The MLP is what holds most.
    model = qwen3(tmp_path, hidden_size=128, intermediate_size=4096, num_hidden_layers=3)
    about: dict[str, Any] = {"world_size": 1, "seq_len": 4 * tiled.TILE, "optimizer": "AMCS", "loss": "chunked"}
    about |= {"host_memory": 10**12, "ranks_per_machine": 1}

    def found(memory: int) -> dict[str, Candidate]:
        every = recommend(model, gpu_memory=memory, **about)
        at = [one for one in every if (one.config, one.state) == ("amcs_zero2", "8bit, bf16+8")]
        return {str(one.activations): one for one in at}

    needs = {kept: one.needs for kept, one in found(10**9).items()}  # less than the context alone
    assert needs["full"] > needs["checkpoint"] > needs["checkpoint,tiled"] > needs["offload,tiled"]
    assert needs["checkpoint"] > needs["offload"] and len(needs) == 5
    tried = found(holds((needs["checkpoint"] + needs["checkpoint,tiled"]) // 2))
    assert tried.keys() == {"full", "checkpoint", "checkpoint,tiled"} and tried["checkpoint,tiled"].fits
    assert tried["checkpoint,tiled"].cost > tried["checkpoint"].cost
    # The last block's activations are what the backward pass begins with, kept or not.
    assert found(holds(needs["checkpoint"])).keys() == {"full", "checkpoint:2"}


def test_a_plan_computes_as_few_blocks_again_as_fit(tmp_path: Path) -> None:
    model = qwen3(tmp_path, hidden_size=128, intermediate_size=1024, num_hidden_layers=6)
    about: dict[str, Any] = {"world_size": 1, "seq_len": 4096, "optimizer": "AMCS", "loss": "chunked"}
    about |= {"host_memory": 0, "ranks_per_machine": 1}

    def needs(blocks: int, size: int = 1) -> int:
        kept = Activations(checkpoint=True, blocks=blocks) if blocks else Activations()
        one = Case(model, load_config("amcs_zero2"), 1, size, 4096, activations=kept, loss="chunked")
        return Estimator().predict(one).needed

    sizes = [needs(blocks) for blocks in range(7)]
    assert sizes[:6] == sorted({*sizes[:6]}, reverse=True)
    assert sizes[5] <= sizes[6], "the last block's are what the backward pass begins with"
    for memory in (sizes[2], sizes[4], sizes[6]):
        best, *others = recommend(model, gpu_memory=holds(memory), **about)
        blocks, size = best.activations.blocks, best.micro_batch
        assert blocks and best.fits and best.config == "amcs_zero2"
        assert best.needs == needs(blocks, size) <= memory < needs(blocks - 1, size)
        [whole] = [one for one in others if (one.config, one.state, one.fits) == ("amcs_zero1", best.state, True)]
        assert whole.activations == Activations(checkpoint=True) and best.cost < whole.cost
    assert recommend(model, gpu_memory=holds(sizes[0]), **about)[0].activations == Activations()


def test_a_run_of_before_the_setting_had_words_is_reported_as_one_of_today(tmp_path: Path) -> None:
    now, before = write_run(tmp_path / "now"), write_run(tmp_path / "before")
    changed = 0
    for path in before.rglob("*.json"):
        text = path.read_text()
        old = text.replace('"activations": "full"', '"activation_checkpointing": false')
        changed += old != text
        path.write_text(old)
    assert changed >= 3  # the prediction and a measurement of each rank
    first, second = (build_report([folder]).runs[0] for folder in (now, before))
    assert second.facts == first.facts and str(second.facts.activations) == "full"
    assert second.problems == []
