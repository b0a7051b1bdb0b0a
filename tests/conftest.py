"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and tokenizers, or a skip: a user's checkout has none of it."""
    folder = Path(os.environ.get("LEANSTATE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder ({folder} does not exist; set LEANSTATE_SHARED_DATA)")
    return folder
