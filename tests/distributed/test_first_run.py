"""The optimizer step is compiled before the first step, once for all ranks, and the process that does it never outlives
the run."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import SERVER, case, environment, launched, run_ranks

from toolkit.records.run import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
LION = Path(__file__).parents[1] / "plugins" / "lion.py"

# What each process compiled, written when it ends; in the background process nothing of this file runs on.
COUNTING = f"""
import atexit, json, os, runpy

runpy.run_path({str(LION)!r})


@atexit.register
def write():
    from torch._dynamo.utils import counters

    open(f"{{__file__}}.{{os.getpid()}}", "w").write(json.dumps(counters["inductor"]))
"""

# In the background process: as if the C++ compiler never came to an end.
SLEEPING = """
import subprocess, sys

if sys.argv[0].endswith("compiling.py"):
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)", __file__])
"""


def lion(stage: int, computed: str = "bf16", **params: Any) -> dict[str, Any]:
    precision = {computed: {"enabled": True}} if computed != "fp32" else {}
    return precision | {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Lion", "params": {"lr": 1e-3, "state_format": "fp32"} | params},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000},
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
    }


def test_no_step_compiles_what_was_compiled_before_it(tmp_path: Path) -> None:
    offload = {"reduce_bucket_size": 20_000, "offload_optimizer": {"device": "cpu"}}
    configs = {f"stage-{stage}": lion(stage) for stage in (0, 1, 2, 3)}
    configs["stage-0"]["optimizer"]["params"]["weights"] = "fp32"
    configs["master-2"] = lion(2, weights="fp32")
    configs["fp16-2"] = lion(2, "fp16", weights="fp32") | {"fp16": {"enabled": True, "initial_scale_power": 6}}
    configs["fp32-3"] = lion(3, "fp32", weights="fp32")
    configs |= {f"released-{stage}": lion(stage, release_gradients=True) for stage in (2, 3)}
    for stage in (2, 3):
        configs[f"offload-{stage}"] = lion(stage) | {"zero_optimization": offload | {"stage": stage}}
    runs = run_ranks(tmp_path, 2, {name: case(one, steps=3) for name, one in configs.items()}, plugins=[LION])
    assert {name: [rank["compiled_late"] for rank in ranks] for name, ranks in runs.items()} == {
        name: [0, 0] for name in configs
    }


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Options of a small run with a rule that compiles quickly."""
    text = tmp_path / "documents.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{n}: " + " ".join(map(str, range(n, n + 60)))}) + "\n" for n in range(300))
    )
    (tmp_path / "lion.json").write_text(json.dumps(lion(2, "fp32", weights="fp32")))
    line = f"--data {text} --config {tmp_path / 'lion.json'} --seq-len 32 --steps 3 --eval-every 0 --save-every 0"
    return [*line.split(), "--run-dir", str(tmp_path / "run"), "--plugin", str(tmp_path / "plugin.py")]


def cached_in(folder: Path) -> dict[str, str]:
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
    }


def test_ranks_load_what_one_process_compiled(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(COUNTING)
    # With the flag, which is part of what the compiler's cache goes by.
    train = REPOSITORY / "launch" / "train.py"
    status, said = launched(tmp_path, 2, train, *settings, "--deterministic", more=cached_in(tmp_path))
    assert status == 0, said
    found = [json.loads(path.read_text()) for path in tmp_path.glob("plugin.py.*")]
    ranks = [one for one in found if one]
    assert len(ranks) == 2 and all(one.get("fxgraph_cache_hit") == 1 for one in ranks), found
    assert not any("miss" in key or "bypass" in key for one in ranks for key in one), found
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record.get("compile_s", 0.0) > 0.0 for record in records] == [True, False, False]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["compile_s"] == records[0]["compile_s"] and "of compiling" in said
    assert list((tmp_path / "cache").glob("leanstate-*")), "a later run starts no process"


def processes(plugin: Path, word: str = "") -> list[list[str]]:
    """The command lines that name this plugin, and `word`."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(plugin) in " ".join(line) and word in " ".join(line)]


@pytest.mark.parametrize(
    "end",
    [
        "error",
        *(pytest.param(end, marks=pytest.mark.slow) for end in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)),
    ],
)
def test_nothing_compiles_on_when_the_run_has_ended(settings: list[str], tmp_path: Path, end: Any) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(f"import runpy\nrunpy.run_path({str(LION)!r})\n{SLEEPING}")
    more = ["--seq-len", "1000000"] if end == "error" else []
    log, command = tmp_path / "log", [sys.executable, "-m", "toolkit.train", *settings, *more]
    run = SERVER.start(command, environment() | cached_in(tmp_path), log)
    deadline = time.monotonic() + 120
    while not processes(plugin, "time.sleep"):
        if end == "error" and run.poll() is not None:  # the error may be found before the compiler starts
            break
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    if end == "error":
        assert run.wait(timeout=120) == 2 and "\nerror: " in f"\n{log.read_text()}"
    else:
        while "compiling" not in log.read_text():
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.05)
        run.send_signal(end)
        assert run.wait(timeout=60) == (130 if end == signal.SIGINT else -end)
    deadline = time.monotonic() + 20
    while (left := processes(plugin)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
