"""`toolkit bench` called in this process, which keeps its threads and environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from toolkit import cli


@contextmanager
def process_kept() -> Iterator[None]:
    """What the command sets of this process, its threads and some of its environment, is as before afterwards."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def run(monkeypatch: pytest.MonkeyPatch, *given: str) -> int:
    """The status that `toolkit bench` with these arguments ends with."""
    monkeypatch.setattr(sys, "argv", ["toolkit", "bench", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)
