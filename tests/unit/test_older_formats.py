"""Checkpoints of the first format, in which a block could belong to two parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import cut, rewrite

from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.source import Source
from toolkit.errors import UserError


def _first_format(body: dict[str, Any], shape: list[int]) -> None:
    """As the first format has it, with another first matrix and what follows it next to it."""
    body["format"] = 1
    for state in body["sharding"]["states"]:
        state["near"] = state.pop("residual_of")
    first, second = body["sharding"]["flat_tensors"][0]["parameters"]
    first["shape"] = shape
    if body["sharding"]["stage"] < 3:
        second["offset"] = shape[0] * shape[1]


def test_the_first_format_is_read_where_its_blocks_are_the_same(tmp_path: Path) -> None:
    folder = cut(tmp_path, 2, 3)
    before = Source(folder).digest()
    rewrite(folder, lambda body: _first_format(body, [48, 32]))
    assert Source(folder).digest() == before


def test_blocks_of_two_parameters_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = cut(tmp_path, 2, 3)
    rewrite(folder, lambda body: _first_format(body, [47, 32]))
    with pytest.raises(UserError, match=r"older version, which let 'b.weight' share a block .* convert it to stage 3"):
        Source(folder)
    # At stage 3 it can be read, and cannot be written as groups of several such matrices at another stage.
    folder = cut(tmp_path / "3", 3, 2)
    rewrite(folder, lambda body: _first_format(body, [47, 32]))
    with pytest.raises(
        UserError, match="to stage 1: an older version saved it, and there 'b.weight' would share a block"
    ):
        convert(Source(folder), tmp_path / "converted", stage=1, world_size=1)
    convert(Source(folder), tmp_path / "converted", stage=3, world_size=1)
