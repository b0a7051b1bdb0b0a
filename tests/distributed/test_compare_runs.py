"""A real comparison: stopped in the middle of a run by Ctrl-C or its minutes, resumed, extended, refused."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ranks import SERVER, environment, toolkit_command

STEPS = 12
SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


LATE = """
import itertools, os, time, types
from pathlib import Path
from toolkit.compare import drive
from toolkit.run.stopping import StopRequest

if folder := os.environ.get("LATE"):
    def clock():
        return time.monotonic() + 3600 * any(Path(folder).rglob("manifest.json"))

    def requested(stop):
        while next(steps) > 4 and not asked(stop):
            time.sleep(0.01)
        return asked(stop)

    drive.time = types.SimpleNamespace(monotonic=clock, sleep=time.sleep)
    asked, steps = StopRequest.requested.fget, itertools.count(1)
    StopRequest.requested = property(requested)
"""
"""A plug-in: once a run has a checkpoint an hour passes for the comparison, and a run waits in its fifth step."""


def command(folder: Path, *more: str) -> list[str]:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(SHAPE))
    text = " ".join(f"the {index % 7} quick {index % 11} brown foxes" for index in range(4000))
    (folder / "text.txt").write_text(text.replace("foxes", "foxes\n"))
    options: dict[str, Any] = {
        "--model": folder / "model",
        "--tokenizer": "python-4k",
        "--data": folder / "text.txt",
        "--steps": STEPS,
        "--seq-len": 16,
        "--micro-batch": 2,
        "--eval-sequences": 4,
        "--save-every": 2,
        "--memory-profile": "summary",
        "--out": folder / "out",
    }
    flat = [str(part) for item in options.items() for part in item]
    return toolkit_command("compare", *flat, *more)


def run(folder: Path, *given: str, more: Mapping[str, str] | None = None) -> tuple[int, str]:
    (folder / "log").unlink(missing_ok=True)
    return SERVER.call(command(folder, *given), environment() | dict(more or {}), folder / "log", launches=True)


def losses(folder: Path) -> dict[str, list[float]]:
    """The training losses of every run that is there, by its place."""
    return {
        str(path.parent.relative_to(folder / "out" / "runs")): [
            json.loads(line)["loss"] for line in path.read_text().splitlines()
        ]
        for path in sorted((folder / "out" / "runs").rglob("metrics.jsonl"))
    }


def interrupt(folder: Path, *more: str) -> None:
    """Start a comparison and press Ctrl-C once its first run has saved a checkpoint."""
    process = SERVER.start(command(folder, *more), environment(), folder / "log", launches=True, session=True)
    until = time.monotonic() + 200
    while not list((folder / "out" / "runs").rglob("manifest.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=100) == 130


def resume(folder: Path) -> tuple[int, str]:
    """As `run`, by the folder alone."""
    return SERVER.call(
        toolkit_command("compare", "--out", str(folder / "out")), environment(), folder / "resumed.log", launches=True
    )


def test_a_run_that_was_interrupted_is_resumed(tmp_path: Path) -> None:
    interrupt(tmp_path, "--methods", "amcs", "--set", "optimizer.params.compile=false", "--seeds", "1")
    [(place, cut)] = losses(tmp_path).items()
    assert place == "amcs/as-configured/seed0" and 2 <= len(cut) < STEPS, "it was stopped in the middle"
    assert "No run has ended yet." in (tmp_path / "out" / "report.md").read_text()

    status, said = resume(tmp_path)
    assert status == 0, said
    assert "resumed: amcs as-configured seed 0" in said
    whole = losses(tmp_path)[place]
    assert len(whole) == STEPS and whole[: len(cut)] == cut, "what was made before the interruption stays"
    assert not list((tmp_path / "out" / "runs").rglob("checkpoints")), "of runs that have ended, none are kept"
    summary = json.loads((tmp_path / "out" / "runs" / place / "summary.json").read_text())
    [method] = json.loads((tmp_path / "out" / "report.json").read_text())["methods"]
    assert method["losses"] == {"0": summary["val_loss"]} and method["why_untuned"] == "nothing is swept"


def test_a_comparison_stopped_by_its_minutes_ends_with_the_losses_of_one_that_was_not(tmp_path: Path) -> None:
    plugin = tmp_path / "late.py"
    plugin.write_text(LATE)
    plan = ["--methods", "amcs,muon8", "--set", "optimizer.params.compile=false", "--seeds", "1"]
    plan += ["--plugin", str(plugin)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    status, said = run(whole, *plan)
    assert status == 0, said

    status, said = run(cut, *plan, "--minutes", "7.5", more={"LATE": str(cut)})
    assert status == 130, said
    assert "7.5 minutes are over." in said and "stopped; the same command resumes." in said
    [(place, values)] = losses(cut).items()
    assert place == "amcs/as-configured/seed0" and 2 <= len(values) < STEPS, "it was stopped in the middle"
    assert "No run has ended yet." in (cut / "out" / "report.md").read_text()

    status, said = run(cut, *plan, "--minutes", "60")
    assert status == 0, said
    assert "resumed: amcs as-configured seed 0" in said and "are over" not in said
    assert len(losses(whole)) == 2 and losses(cut) == losses(whole)
    final = [json.loads((folder / "out" / "report.json").read_text())["methods"] for folder in (whole, cut)]
    assert [method["losses"] for method in final[1]] == [method["losses"] for method in final[0]]
    assert run(cut, *plan, "--minutes", "0")[0] == 0, "nothing is left to make"


@pytest.mark.slow
def test_two_methods_at_two_rates_and_two_seeds_interrupted_and_extended(tmp_path: Path) -> None:
    plan = ["--methods", "amcs,torch.optim.AdamW", "--sweep", "lr=1e-3,2e-3", "--extend", "0"]
    interrupt(tmp_path, *plan, "--seeds", "1")
    [(place, cut)] = losses(tmp_path).items()
    status, said = resume(tmp_path)
    assert status == 0, said
    made = losses(tmp_path)
    assert len(made) == 2 * 2 and {len(values) for values in made.values()} == {STEPS}
    assert made[place][: len(cut)] == cut

    status, said = run(tmp_path, *plan, "--seeds", "2", "--jobs", "2")
    assert status == 0, said
    assert said.count("started: ") == 2, "nothing that has ended is made again"
    made = losses(tmp_path)
    for seed in (0, 1):
        first = {values[0] for key, values in made.items() if key.endswith(f"seed{seed}")}
        assert len(first) == 1, "every method begins with the same weights and the same batch"
    amcs, adamw = json.loads((tmp_path / "out" / "report.json").read_text())["methods"]
    assert adamw["difference"]["mean"] == pytest.approx(adamw["mean"] - amcs["mean"])
    assert adamw["difference"]["standard_error"] > 0
    assert adamw["state_per_parameter"] == pytest.approx(12, abs=0.1) and amcs["state_per_parameter"] < 4.5

    status, said = run(tmp_path, *plan, "--global-batch", "4")
    assert status == 2 and "global_batch" in said and "another --out" in said


def test_what_is_wrong_with_every_run_stops_at_the_first(tmp_path: Path) -> None:
    command(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    status, said = run(tmp_path, "--methods", "amcs", "--data", str(tmp_path / "empty.txt"))
    assert status == 2 and said.count("error: ") == 1 and "empty.txt" in said
