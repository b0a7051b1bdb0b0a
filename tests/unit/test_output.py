"""A closed pipe or terminal ends nothing: the work is done, what nobody can read is dropped."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

PRINTS = """
import sys
from pathlib import Path
from toolkit.run.output import outliving

with outliving("nobody reads."):
    print("first", flush=True)
    sys.stdin.readline()  # until the reader is gone
    for _ in range(3):
        print("x" * 100_000, flush=True)
    import os
    os.write(1, b"from C")
    Path(sys.argv[1]).write_text("done")
"""


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("reader", ["pipe", "terminal"])
def test_work_is_done_though_nobody_reads(tmp_path: Path, reader: str, both: bool) -> None:
    read, write = os.pipe() if reader == "pipe" else pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=write,
        stderr=write if both else subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert os.read(read, 5) == b"first"
    os.close(read)
    _, error = process.communicate("\n", timeout=60)
    assert process.returncode == 0 and (tmp_path / "out").read_text() == "done"
    if not both:
        assert error == "note: nobody reads.\n"


@pytest.mark.parametrize("command", [["configs"], ["configs", "amcs_zero2"], ["--help"], ["nonsense"]])
def test_commands_survive_a_closed_pipe(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-c", "from toolkit.cli import main; main()", *command],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    if command == ["nonsense"]:
        assert run.returncode == 2 and "nonsense" in run.stderr
    else:
        assert (run.returncode, run.stderr) == (0, "")
