"""What docs/examples shows runs as it is, and learns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import SERVER, environment, free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
START = "import os, runpy\nos.chdir({!r})\nrunpy.run_path({!r}, run_name='__main__')\n"


def test_each_is_tested_and_named_in_the_docs() -> None:
    names = {path.name for path in EXAMPLES.iterdir()}
    assert names == {"plain_torch.py", "hf_trainer.py", "deepspeed_loop.py", "first_run.ipynb"}
    assert all(f"](examples/{name})" in (ROOT / "docs" / "how-to.md").read_text() for name in names)


@pytest.mark.parametrize("name", ["plain_torch.py", "hf_trainer.py", "deepspeed_loop.py"])
def test_a_script_learns(name: str, tmp_path: Path) -> None:
    (tmp_path / "start.py").write_text(START.format(str(tmp_path), str(EXAMPLES / name)))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(tmp_path / "start.py")]
    status, said = SERVER.call(command, environment() | alone | {"MASTER_PORT": str(free_port())}, tmp_path / "log")
    assert status == 0, said
    losses = [float(loss) for loss in re.findall(r"\bloss'?:? '?(\d+\.\d+)", said)]
    assert len(losses) >= 2 and losses[-1] < 0.9 * losses[0], said
    if name == "deepspeed_loop.py":
        run = tmp_path / "runs" / "own-loop"
        assert (run / "memory" / "rank0.json").exists()
        assert (run / "checkpoints" / "global_step20" / "manifest.json").exists()
    if name == "hf_trainer.py":
        assert "stepped by AMCS" in said


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells in their order: lines with an exclamation mark are the shell's, as in Jupyter."""
    (tmp_path / "toolkit").write_text(f"#!{sys.executable}\nfrom toolkit.cli import main\nmain()\n")
    (tmp_path / "toolkit").chmod(0o755)
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    for cell in json.loads((EXAMPLES / "first_run.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("!"):
            done = subprocess.run(
                source[1:], shell=True, env=environment() | variables, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, source + done.stdout[-3000:] + done.stderr[-3000:]
        elif cell["cell_type"] == "code":
            exec(source, names)
    assert names["losses"][-1] < names["losses"][0] - 1
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()
