"""What README tells a user to type works."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import SERVER, deepspeed_launcher, environment, free_port, toolkit_command

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (\S.*)$", README, flags=re.MULTILINE)
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

PRELUDE = """
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1, head_dim=16))
batches = [(torch.randint(0, 64, (4, 1)) + torch.arange(16)) % 64 for _ in range(3)]
"""


SHOWN = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)


def shapes(text: str, folder: str) -> list[str]:
    """The lines of `text` without their numbers, units and blanks; what a table breaks into lines is one."""
    found: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and not cells[0]:
            found[-1] += cells[1]
        elif line and line[0] not in "┌└":
            found.append(" ".join(cells or [line]))
    plain = ["".join(line.split()).replace(folder, "RUN") for line in found]
    return [re.sub(r"#[kMGTP]?(B|FLOP/s)", r"#\1", re.sub(r"\d[\d,.:]*(e[-+]?\d+)?", "#", line)) for line in plain]


def run(command: list[str], **kwargs: object) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return str(done.stdout)


def forked(command: list[str], folder: Path) -> None:
    """In the place of `run`, with everything imported."""
    status, said = SERVER.call(command, environment(), folder / "log", launches=True)
    assert status == 0, said[-6000:]


def test_it_shows_the_two_commands() -> None:
    typed = [command.split("#")[0].strip() for command in COMMANDS]
    assert typed[:2] == ["make train", "make test"]


def test_make_train(tmp_path: Path) -> None:
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip("needs the environment that `make install` sets up")
    options = f"--steps 4 --seq-len 32 --eval-every 2 --eval-sequences 4 --run-dir {tmp_path / 'run'}"
    shell = "LEANSTATE_SHELL_PATH=/nowhere"  # as of a user who has not activated the environment
    shown = run(["make", "train", "RANKS=1", f"VENV={sys.prefix}", shell, f"ARGS={options}"])
    [block] = SHOWN
    shown = shown.replace(f"{sys.prefix}/bin/", ".venv/bin/")  # where it is not in this folder
    printed = shapes(shown, str(tmp_path / "run"))
    assert [line for line in shapes(block, "runs/one") if line not in printed] == [], printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert 4.0 < summary["state_bytes_per_parameter"] < 4.1, "three states of 8 bits, 8 bits of remainder"
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


TRAINING = [command.split("#")[0] for command in COMMANDS if command.startswith("deepspeed") and "fineweb" in command]


def train(command: str, folder: Path, *small: str) -> list[dict[str, object]]:
    """Run it as README has it, but for the size of the model and with local text in the place of the hub's."""
    if not (folder / "local.parquet").exists():
        texts = [f"Document {i}. " + "The cat sat on the mat. " * 40 for i in range(300)]
        pq.write_table(pa.table({"text": texts}), folder / "local.parquet")
    words = shlex.split(command.replace("--data fineweb", f"--data {folder / 'local.parquet'}"))
    fixed = ["--model", "qwen3-tiny", "--seq-len", "32", "--run-dir", str(folder / "run")]
    forked([*deepspeed_launcher(), *words[1:], *fixed, *small], folder)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_training_command(tmp_path: Path) -> None:
    lines = train(TRAINING[0], tmp_path, "--steps", "2")
    assert [line["step"] for line in lines] == [1, 2]
    wanted = {"loss", "lr", "grad_norm", "alpha", "tokens_per_s", "memory_bytes"}
    assert all(wanted <= line.keys() for line in lines)


def test_a_run_is_resumed_with_fewer_ranks_and_is_exported(tmp_path: Path) -> None:
    first, second = TRAINING[1:]
    tokenizer = ["--tokenizer", "python-4k"]
    train(first.replace("--num_gpus 8", "--num_gpus 2"), tmp_path, "--steps", "2", *tokenizer)
    lines = train(second.replace("--num_gpus 2", "--num_gpus 1"), tmp_path, "--steps", "3", *tokenizer)
    # The lines say nothing of the batch: it is 4 x 2 ranks, and stays that on one.
    assert [(line["step"], line["sequences"], line["tokens"]) for line in lines] == [(n, 8, 8 * 32) for n in (1, 2, 3)]
    assert lines[2]["changed"][0] == "ranks 2, now 1" and "gradient accumulation 1, now 2" in lines[2]["changed"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["tokens"] == 3 * 8 * 32
    (export,) = (command.split("#")[0] for command in COMMANDS if command.startswith("toolkit export"))
    words = shlex.split(export.replace("runs/first", str(tmp_path / "run")).replace("exported", str(tmp_path / "out")))
    forked(toolkit_command(*words[1:]), tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}


# Threads of a process group that outlive the interpreter abort it now and then.
EPILOGUE = """
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("index", range(len(PYTHON_BLOCKS)))
def test_the_python_blocks(index: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in (alone | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setitem(os.environ, key, value)
    (tmp_path / "block.py").write_text(PRELUDE + PYTHON_BLOCKS[index] + EPILOGUE)
    forked([sys.executable, str(tmp_path / "block.py")], tmp_path)
