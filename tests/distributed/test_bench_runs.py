"""`toolkit bench train` and `save`, whose runs are processes of their own: real ranks, forked or by the launcher."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import SERVER, environment, free_port

from toolkit import cli
from toolkit.bench import save, train
from toolkit.bench.methods import read_each
from toolkit.bench.record import Record
from toolkit.config import load_config
from toolkit.models import flops_per_token
from toolkit.models import load_config as load_model

START = "import runpy, sys\nrunpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"


@pytest.fixture
def amcs(tmp_path: Path) -> str:
    """The method, by a JSON whose step is not compiled, which proves nothing here."""
    config = load_config("amcs_zero2")
    config["optimizer"]["params"]["compile"] = False
    (tmp_path / "amcs.json").write_text(json.dumps(config))
    return f"amcs={tmp_path / 'amcs.json'}"


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes of one rank begin with everything imported."""
    script = tmp_path / "start.py"
    script.write_text(START)

    def finish(command: Sequence[str], threads: int, log: Path, name: str) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        own = environment() | alone | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": str(threads)}
        options = list(command[command.index("-m") + 1 :])
        assert SERVER.run(script, options, [own], log, timeout=300), log.read_text()[-6000:]

    for module in (train, save):
        monkeypatch.setattr(module, "finish", finish)


def run(monkeypatch: pytest.MonkeyPatch, *given: str) -> int:
    for name in ("OMP_NUM_THREADS", "LEANSTATE_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sys, "argv", ["toolkit", "bench", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


SMALL = ("--model", "qwen3-3m", "--threads", "1")


@pytest.mark.usefixtures("_forked")
def test_a_run_and_the_trainer_are_timed_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, amcs: str) -> None:
    file = tmp_path / "train.json"
    given = ["--seq-len", "16", "--steps", "7", "--rounds", "1", "--peak-tflops", "0.5", "--json", str(file)]
    assert run(monkeypatch, "train", "--methods", f"hf-trainer,{amcs}", *SMALL, *given) == 0
    trainer, own = Record.model_validate_json(file.read_text()).rows
    assert (trainer.name, own.name) == ("hf-trainer", "amcs")
    assert trainer.timed["step_seconds"].samples == own.timed["step_seconds"].samples == 7
    seconds = own.timed["step_seconds"].median
    assert own.timed["tokens_per_s"].median == pytest.approx(2 * 16 / seconds, rel=0.1)
    flops = flops_per_token(load_model("qwen3-3m")[0], 16)
    for row in (trainer, own):
        assert row.counted["mfu"] == pytest.approx(row.timed["tokens_per_s"].median * flops / 0.5e12)
    assert trainer.counted["speed_ratio"] == 1 and own.counted["speed_ratio"] > 0
    assert min(row.counted["peak_bytes"] for row in (trainer, own)) > 1e8


@pytest.mark.usefixtures("_forked")
def test_checkpoints_are_saved_and_loaded(tmp_path: Path, amcs: str) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    settings = {"model": "qwen3-3m", "steps": 1, "seq_len": 64, "micro_batch": 2, "eval_every": 0, "save_every": 0}
    methods = read_each([amcs, "deepspeed"], save.DEEPSPEED, 2)
    own, deepspeed = save.measure(methods, settings, 1, 1, 2, scratch, say=lambda words: None).rows
    for row in (own, deepspeed):
        assert all(row.timed[key].samples == 2 for key in save.TIMED)
        assert row.timed["pause_seconds"].median <= row.timed["save_seconds"].median
    # Weights in bf16, fp32 ones and two moments; what AMCS holds takes less than half of that.
    assert deepspeed.counted["bytes_per_parameter"] == pytest.approx(14, rel=0.05)
    assert own.counted["bytes_per_parameter"] < 7
    assert not list(scratch.iterdir()), "checkpoints take gigabytes"


@pytest.mark.slow
def test_two_ranks_by_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, amcs: str) -> None:
    file = tmp_path / "two.json"
    given = ["--ranks", "2", "--seq-len", "16", "--steps", "7", "--rounds", "1", "--json", str(file)]
    assert run(monkeypatch, "train", "--methods", f"hf-trainer,{amcs}", *SMALL, *given) == 0
    assert [row.timed["tokens_per_s"].samples for row in Record.model_validate_json(file.read_text()).rows] == [7, 7]
    given = ["--ranks", "2", "--steps", "1", "--repeats", "7", "--json", str(file)]
    assert run(monkeypatch, "save", "--methods", f"{amcs},deepspeed", *SMALL, *given) == 0
    assert all(row.timed["load_seconds"].median > 0 for row in Record.model_validate_json(file.read_text()).rows)
