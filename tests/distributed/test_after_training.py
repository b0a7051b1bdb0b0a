"""`toolkit train` of the wheel, where no checkout is; `sample` and `eval` of what it and other runs left."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import environment
from test_checkpoints import WAYS, World, steps_of
from transformers import AutoModelForCausalLM

import toolkit
from toolkit import cli
from toolkit.checkpoint.export import export
from toolkit.checkpoint.store import Store
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.commands.checkpoint import find
from toolkit.data import load_tokenizer
from toolkit.models import cpu_matmul
from toolkit.records.run import read_metrics
from toolkit.run import ranks

ROOT = Path(__file__).resolve().parents[2]
START = "from toolkit.cli import main; main()"
WHERE = "import toolkit\n\nopen({!r}, 'a').write(toolkit.__file__ + '\\n')\n"


class Clean:
    """A folder with the wheel unpacked, and another one to work in."""

    def __init__(self, root: Path) -> None:
        self.site, self.place, self.built = root / "site", root / "place", root / "built"
        self.place.mkdir(parents=True)
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(root)]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = root.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(self.site)
        # What lies in the working folder is nobody's module.
        for name in ("toolkit.py", "torch.py", "deepspeed.py"):
            (self.place / name).write_text("raise SystemExit('the wrong module')\n")
        (self.place / "where.py").write_text(WHERE.format(str(root / "where.txt")))
        self.where = root / "where.txt"
        world = World(root)
        self.arguments = [
            *world.arguments("run", ["--config", "amcs_zero2"], 2, "--val-data", str(world.data)),
            *("--eval-every", "4", "--eval-sequences", "6", "--plugin", "where.py"),
        ]
        self.run = root / "run"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", START, *arguments],
            cwd=self.place,
            env=environment() | {"PYTHONPATH": str(self.site), "TORCH_EXTENSIONS_DIR": str(self.built)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def until_it_steps(self, *more: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
        """A run on two ranks that has made two steps, and all its processes."""
        process = self.start("train", "--ranks", "2", *self.arguments, "--steps", "100000", *more)
        metrics = Path(more[-1]) / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and len(read_metrics(metrics)) >= 2):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        return process, psutil.Process(process.pid).children(recursive=True)

    def call(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        process = self.start(*arguments)
        out, error = process.communicate(timeout=400)
        assert process.returncode == status, out + error
        return out, error


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    return Clean(tmp_path_factory.mktemp("clean"))


def evaluated(clean: Clean, call: Any) -> None:
    found = call("eval", str(clean.run), "--plugin", str(clean.place / "where.py"))
    last = read_metrics(clean.run / "metrics.jsonl")[-1]
    assert found["step"] == last["step"] and f"{found['loss']:.4f}" == f"{last['val_loss']:.4f}"
    assert (found["sequences"], found["seq_len"], found["tokens"]) == (6, 32, 192)
    assert set(clean.where.read_text().split()) == {str(clean.site / "toolkit" / "__init__.py"), toolkit.__file__}
    assert not clean.built.exists(), "DeepSpeed has built no extension"


def test_the_wheel_trains_where_no_checkout_is(clean: Clean, call: Any) -> None:
    out, _ = clean.call("train", *clean.arguments, "--steps", "4")
    assert out.startswith("starting 1 rank\n") and "next:" in out
    assert set(clean.where.read_text().split()) == {str(clean.site / "toolkit" / "__init__.py")}
    evaluated(clean, call)


@pytest.mark.slow
def test_a_run_that_ctrl_c_stopped_and_that_changed_its_ranks_has_its_validation_loss(
    tmp_path: Path, call: Any
) -> None:
    clean = Clean(tmp_path)
    process, everyone = clean.until_it_steps("--run-dir", str(clean.run))
    metrics = clean.run / "metrics.jsonl"
    # A terminal sends it to the processes in its foreground, of which this is the only one.
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=200)
    assert process.returncode == 130, out + error
    assert psutil.wait_procs(everyone, timeout=10)[1] == []
    assert "Run interrupted" in out and out.startswith("starting 2 ranks\n") and "Traceback" not in out + error
    assert not any(word in out + error for word in ("[INFO]", "[WARNING]", "[ERROR]")), "its banner is quiet"
    steps = len(read_metrics(metrics))
    assert Store(clean.run / "checkpoints").steps()[0] == steps == read_metrics(metrics)[-1]["step"]
    assert json.loads((clean.run / "run.json").read_text())["world_size"] == 2
    out, _ = clean.call("train", *clean.arguments, "--steps", str(steps + 2))
    assert out.startswith("starting 1 rank\n") and f"after step {steps}" in out
    evaluated(clean, call)


@pytest.mark.slow
def test_ranks_stop_when_the_command_is_killed_and_errors_are_one_sentence(clean: Clean) -> None:
    process, everyone = clean.until_it_steps("--run-dir", str(clean.run.with_name("killed")))
    process.kill()
    process.communicate(timeout=200)
    assert psutil.wait_procs(everyone, timeout=100)[1] == []
    records = read_metrics(clean.run.with_name("killed") / "metrics.jsonl")
    assert find(clean.run.with_name("killed")).name == f"global_step{len(records)}"
    _, error = clean.call("train", "--ranks", "2", "--model", "qwen3-tinny", status=2)
    assert error.startswith("error: unknown model 'qwen3-tinny'") and error.count("\n") == 1


# ---- weights of every kind, in this process ----

KINDS = {
    "remainder": WAYS["amcs-2"],
    "partitioned": WAYS["compact"],
    "lean": ["--config", "amcs_zero2_lean"],
    "masters": WAYS["adamw-2"],
    "fp32": WAYS["fp32-3"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Runs on two ranks, each with its last validation at its last step."""
    world = World(tmp_path_factory.mktemp("kinds"))
    val = ("--val-data", str(world.data), "--eval-every", "2", "--eval-sequences", "7", "--steps", "4")
    steps = [{"run": world.arguments(name, way, 2, *val)} for name, way in KINDS.items()]
    steps_of(world, "ranks", 2, steps)
    export(open_checkpoint(find(world.root / "lean")), world.root / "exported")
    yield world
    cpu_matmul.uninstall()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: World) -> Callable[..., Any]:
    """Calls the command, with --json: what it prints, read, or (with `status`) the line on stderr."""
    monkeypatch.chdir(world.root)
    monkeypatch.setattr(ranks, "prepare_environment", lambda: None)  # it is for a process of its own

    def call(*arguments: str, status: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["toolkit", *arguments, "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == status, printed.err
        return printed.err.splitlines()[-1] if status else json.loads(printed.out)

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_eval_gives_the_validation_loss_whatever_holds_the_weights(kind: str, world: World, call: Any) -> None:
    found, last = call("eval", kind), world.records(kind)[-1]
    assert (found["step"], found["sequences"], found["tokens"]) == (4, 7, 7 * 32)
    assert f"{found['loss']:.4f}" == f"{last['val_loss']:.4f}"
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / found["bytes"])


def test_eval_of_a_text_is_what_transformers_computes(world: World, call: Any) -> None:
    text = "Document 7 counts: 7 8 9 10 11 12\n" * 3
    (world.root / "own.txt").write_text(text)
    found = call("eval", "exported", "--data", "own.txt", "--seq-len", "16")
    tokenizer = load_tokenizer(str(world.root / "exported"))
    tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    hf: Any = AutoModelForCausalLM.from_pretrained(world.root / "exported", dtype="auto").eval()
    losses = []
    for at in range(0, len(tokens) - 1, 16):
        ids = torch.tensor([tokens[at : at + 17]])
        with torch.no_grad():
            logits = hf(input_ids=ids[:, :-1]).logits.float()
        losses += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none").tolist()
    assert found["tokens"] == len(losses) and len(losses) % 16, "the last sequence is shorter"
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=2e-3)
    assert found["bytes"] == len(text.encode()) - len(tokenizer.decode(tokens[:1]).encode())
    few = call("eval", "exported", "--data", "own.txt", "--seq-len", "16", "--sequences", "1")
    assert few["tokens"] == 16 and few["loss"] == pytest.approx(sum(losses[:16]) / 16, rel=2e-3)


def test_samples_come_from_the_model_the_seed_and_the_prompt(world: World, call: Any) -> None:
    prompts = ("sample", "lean", "Document 1", "Document 2", "--tokens", "6")
    greedy = call(*prompts, "--temperature", "0")["samples"]
    drawn = call(*prompts, "--count", "2", "--seed", "3")
    assert [one["prompt"] for one in drawn["samples"]] == ["Document 1"] * 2 + ["Document 2"] * 2
    assert all(one["ended"] or one["tokens"] == 6 for one in [*greedy, *drawn["samples"]])
    assert call(*prompts, "--count", "2", "--seed", "3") == drawn
    assert call(*prompts, "--count", "2", "--seed", "4")["samples"] != drawn["samples"]
    # From an export it is the same model; with almost no probability left, --top-p draws what is likeliest.
    exported = ("sample", "exported", *prompts[2:])
    assert call(*exported, "--temperature", "0")["samples"] == greedy
    assert call(*exported, "--top-p", "0.0001")["samples"] == greedy
    hf: Any = AutoModelForCausalLM.from_pretrained(world.root / "exported", dtype="auto").eval()
    tokenizer = load_tokenizer(str(world.root / "exported"))
    ids = tokenizer("Document 1", return_tensors="pt")["input_ids"]
    [first] = call("sample", "lean", "Document 1", "--tokens", "1", "--temperature", "0")["samples"]
    with torch.no_grad():
        assert first["text"] == tokenizer.decode([int(hf(input_ids=ids).logits[0, -1].argmax())])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("sample lean x --tokens 99", "are more than the 64 positions of the model."),
        ("sample lean x --count 2 --temperature 0", "--temperature 0 gives one text, always the same"),
        ("sample lean x --checkpoint 3", "lean has no checkpoint of step 3, but of 4."),
        ("sample exported x --checkpoint 4", "exported is an exported model"),
        ("eval lean/checkpoints/global_step4 --checkpoint 4", "--checkpoint is for a run"),
        ("eval lean --seq-len 65", "--seq-len is 65, but the model has 64 positions."),
        ("eval exported", "exported notes no text that its run validates on; give one with --data."),
        ("eval lean --data absent.txt", "there is no data file or folder 'absent.txt'."),
        ("eval lean --data fineweb", "say with --sequences how much of it."),
        ("eval ranks", "holds no checkpoint; expected is a run's folder"),
        ("eval len", "Did you mean 'lean'?"),
        ("eval lean --tasks a --data b.txt", "--tasks bring their own text"),
        ("eval damaged", "global_step4 is damaged: the content of"),
    ],
)
def test_what_cannot_be_is_one_sentence(world: World, call: Any, arguments: str, words: str) -> None:
    if arguments == "eval damaged":
        shutil.copytree(world.root / "lean", world.root / "damaged")
        (file,) = (world.root / "damaged").glob("checkpoints/*/*rank_1*optim_states.pt")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert words in call(*arguments.split(), status=2)


def test_a_text_that_has_changed_is_said(
    world: World, call: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = world.data.read_text()
    world.data.write_text(before.replace("Document", "Paper"))
    monkeypatch.setattr(sys, "argv", ["toolkit", "eval", "lean"])
    with pytest.raises(SystemExit):
        cli.main()
    world.data.unlink()
    assert "note: the text has changed since the run" in capsys.readouterr().err
    try:
        assert "the text that the run validates on: there is no data file" in call("eval", "lean", status=2)
    finally:
        world.data.write_text(before)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_tasks_say_what_they_need(call: Any) -> None:
    assert call("eval", "lean", "--tasks", "arc_easy", status=2).endswith("pip install lm_eval.")
