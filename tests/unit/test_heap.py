"""What stays resident of what was freed, in processes of their own: the C library is told for good."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")

# Pieces of 8 MB, small ones between them that stay; a larger one that was freed has shifted what counts as large.
SCRIPT = """
import sys
from pathlib import Path

from toolkit.run import heap


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


done = heap.map_large() if sys.argv[1] == "scarce" else False
del_me = b"x" * (31 << 20)
del del_me
before = resident()
pieces = [(b"x" * (8 << 20), b"x" * 100_000) for _ in range(16)]
most = resident() - before
kept = [small for _, small in pieces]
del pieces
after = resident() - before
heap.give_back()
print(done, most, after, resident() - before)
"""


def run(memory: str, **environment: str) -> tuple[bool, list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, memory],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    told, *sizes = done.stdout.split()
    return told == "True", [int(size) for size in sizes]


def test_what_is_freed_goes_back_at_once_where_memory_is_scarce() -> None:
    told, (most, after, _) = run("scarce")
    assert told and most > 16 * (8 << 20) and after < 0.1 * most


@pytest.mark.parametrize(
    ("memory", "environment"),
    [
        ("plenty", {}),
        ("scarce", {"MALLOC_MMAP_THRESHOLD_": str(64 << 20)}),
        ("scarce", {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}),
    ],
)
def test_glibc_is_left_alone_else_and_where_the_user_decides(memory: str, environment: dict[str, str]) -> None:
    told, (most, after, given_back) = run(memory, **environment)
    assert not told and after > 0.5 * most
    assert given_back < 0.1 * most, "the holes go back when they are asked for"
