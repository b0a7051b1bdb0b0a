"""Scripts that train a small model on a small text in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from small_models import qwen3


def answer_of(script: str, folder: Path) -> Any:
    """The JSON in the last line that `script` prints, whose arguments are `folder`, with a model in it, and a text."""
    qwen3(folder / "model", vocab_size=4096, num_hidden_layers=1)
    data = folder / "text.txt"
    data.write_text("".join(f"Line {number} of a text, {number * number}.\n" for number in range(600)))
    command = [sys.executable, "-c", script, str(folder), str(data)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])
