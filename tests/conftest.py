"""Fixtures shared by all tests."""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

# `make test` runs two tests at a time; a test's threads beside another's would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import typer.main
import typer.testing
from hypothesis import settings

from toolkit.run.leftovers import own_build_folder

# As in a run of the toolkit, also where a test uses DeepSpeed by itself: else every extension would be built twice.
own_build_folder()

# For each command line Typer would make all commands out of their functions again: 0.13 s.
typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)  # type: ignore[attr-defined]

gc.disable()  # until all tests are found: what they import stays

# Not the user's own; all tests of a session share it, in whatever process.
TOKENS = None if "LEANSTATE_TOKEN_CACHE" in os.environ else tempfile.mkdtemp(prefix="leanstate-tokens-")
if TOKENS is not None:
    os.environ["LEANSTATE_TOKEN_CACHE"] = TOKENS

settings.register_profile("any machine", deadline=None)  # a slow example on a busy machine is no failure
settings.load_profile("any machine")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `alone` waits until no other runs, has all cores, and none begins until it has ended."""
    alone = item.get_closest_marker("alone") is not None
    threads = torch.get_num_threads()
    # Two files that every process has serve as locks: nothing is left behind.
    with open(__file__) as door, open(REPOSITORY / "pyproject.toml") as running:
        # Whoever waits holds the door: else tests that come one after the other would keep a lone one out.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        if alone:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            return (yield)
        finally:
            torch.set_num_threads(threads)


def pytest_collection_finish() -> None:
    """DeepSpeed collects garbage whenever it builds stage 3: half a second, were it to look at all that is imported."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    if TOKENS is not None:
        shutil.rmtree(TOKENS, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and tokenizers, or a skip: a user's checkout has none of it."""
    folder = Path(os.environ.get("LEANSTATE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder ({folder} does not exist; set LEANSTATE_SHARED_DATA)")
    return folder


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A process group of this process alone, for a module whose tests build engines; both leave nothing behind."""
    import deepspeed.comm

    from toolkit.models import cpu_matmul
    from toolkit.run import ranks

    with pytest.MonkeyPatch.context() as environment:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (alone | {"MASTER_PORT": str(ranks.free_port()), "DS_ACCELERATOR": "cpu"}).items():
            environment.setenv(name, value)
        ranks.start()
        yield
        deepspeed.comm.destroy_process_group()
        cpu_matmul.uninstall()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many operations on small tensors: on a busy machine threads wait for one another, tens of times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
