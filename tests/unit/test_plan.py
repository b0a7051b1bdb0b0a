"""What a plan leaves to spare, where it turns to a disk, and what it says while it looks."""

from __future__ import annotations

import functools
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit import cli, console
from toolkit.config import load_config, validate
from toolkit.estimate import recommend as of_plans
from toolkit.estimate.predict import Case, Estimator, with_section
from toolkit.estimate.recommend import NVME_PATH, Candidate, recommend
from toolkit.records.activations import Activations

MODEL = "qwen3-tiny"
LARGE = 10**12


@pytest.fixture(autouse=True)
def _one_way_to_keep_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are no matter here, and each takes its time."""
    monkeypatch.setattr(of_plans, "offered_activations", lambda *about: [Activations()])


@functools.cache
def plan(gpu_memory: int, host_memory: int = LARGE, optimizer: str = "SOAM") -> list[Candidate]:
    about: dict[str, Any] = {"world_size": 1, "seq_len": 64, "ranks_per_machine": 1}
    return recommend(MODEL, gpu_memory=gpu_memory, host_memory=host_memory, optimizer=optimizer, **about)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    line = ["toolkit", "plan", "--model", MODEL, "--seq-len", "64", *arguments]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def with_margin(needs: int) -> int:
    """The least memory of which a plan takes so much."""
    return math.ceil(needs / 0.95)


def test_what_is_recommended_leaves_a_twentieth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    least = min(one.needs for one in plan(10**9, optimizer="AdamW"))  # which is the context alone
    for memory, fits, close in (
        (with_margin(least), True, False),
        (with_margin(least) - 10, False, True),
        (least - 1, False, False),
    ):
        first, *_ = plan(memory, optimizer="AdamW")
        assert (first.fits, first.close) == (fits, close), memory
    out = tmp_path / "plan.json"
    assert run(monkeypatch, "--gpu-memory", f"{least}B", "--optimizer", "adamw", "--out", str(out)) == 1
    printed = capsys.readouterr().out
    table, failed = printed.split("fits too closely to be recommended")[1].split("does not fit")
    assert "less than 5 % of the GPU or of the host to spare" in table and "adamw_zero2_offload" in table
    assert failed.count("\n") > 2 and not out.exists()


def test_the_host_keeps_the_same_margin() -> None:
    def at(host_memory: int) -> Candidate:
        found = plan(2 * 10**9, host_memory)
        return next(one for one in found if (one.config, one.state) == ("soam_zero2_offload", "8bit, bf16+8"))

    needs = at(LARGE).host
    assert at(with_margin(needs)).fits
    assert at(needs).close and not at(needs).fits
    assert not at(needs - 1).close


def test_a_disk_is_the_last_resort(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    needs = {one.config: one for one in sorted(plan(10**9), key=lambda one: -one.needs)}  # the least of each
    offloaded = needs["soam_zero3_offload"]
    memory = with_margin(
        (offloaded.needs + min(one.needs for name, one in needs.items() if "offload" not in name)) // 2
    )
    roomy = plan(memory)
    assert roomy[0].fits and roomy[0].host and not any(one.disk for one in roomy)

    least = min(one.host for one in roomy if one.fits and one.asked)
    best, *others = plan(memory, host_memory=least)
    assert best.fits and best.asked and best.disk and best.config.endswith("_offload on NVMe")
    place = best.json["zero_optimization"]["offload_optimizer"]
    assert (place["device"], place["nvme_path"]) == ("nvme", NVME_PATH)
    there = with_section(best.json, ["zero_optimization", "offload_optimizer"], {"nvme_path": str(tmp_path)})
    validate(there, origin="plan", world_size=1, total_steps=10)
    case = Case(MODEL, best.json, 1, best.micro_batch, 64, activations=best.activations)
    found = Estimator().predict(case)
    assert best.disk == sum(found.nvme.values()) and best.host == sum(found.host.values()) <= 0.95 * least
    assert best.disk / found.setup.parameters == pytest.approx(3.05, rel=0.02)
    assert not any(one.disk for one in others if not one.asked)

    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "plan.json"
    given = ["--gpu-memory", f"{memory}B", "--host-memory", f"{least}B", "--optimizer", "soam", "--out", str(out)]
    assert run(monkeypatch, *given) == 0
    printed = capsys.readouterr().out
    assert re.search(r"host +disk +time +error\n", printed) and "all of which each step reads and writes" in printed
    assert f"nvme_path in {out} is {NVME_PATH}; make it a folder on a local disk with " in printed
    assert load_config(out) == best.json


def test_deepspeeds_own_optimizers_are_not_moved_to_a_disk() -> None:
    least = min(one.needs for one in plan(10**9, optimizer="AdamW"))
    memory, tight = with_margin(least), 100_000  # the GPU has room where the host has none
    assert not any(one.fits or one.disk for one in plan(memory, tight, "AdamW"))
    assert any(one.fits for one in plan(memory, LARGE, "AdamW"))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_plan_says_how_far_it_is_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 0.01)
    assert run(monkeypatch, "--gpu-memory", "8GB", "--optimizer", "adamw", "--json") == 0
    said = capsys.readouterr().err
    shown = {int(number) for number in re.findall(r"looking for what fits, (\d) of 5: adamw_zero", said)}
    assert len(shown) > 1 if terminal else said == ""
