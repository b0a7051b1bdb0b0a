"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a slow example on a busy machine is no failure
settings.load_profile("any machine")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and tokenizers, or a skip: a user's checkout has none of it."""
    folder = Path(os.environ.get("LEANSTATE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder ({folder} does not exist; set LEANSTATE_SHARED_DATA)")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many operations on small tensors: on a busy machine threads wait for one another, tens of times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
