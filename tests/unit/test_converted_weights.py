"""Weights of a checkpoint that is cut for other ranks, or read with another `weights`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_checkpoints import STEP, whole

from toolkit.checkpoint import universal
from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.source import Source
from toolkit.checkpoint.store import name_of
from toolkit.checkpoint.transfer import Transfer
from toolkit.state.remainders import WEIGHTS, Remainder


@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_remainders_of_small_tensors_are_theirs_at_every_stage(tmp_path: Path, weights: str) -> None:
    """Two norms in one flat tensor: the second begins in the middle of a block."""
    origin = Source(whole(tmp_path / "whole", weights=weights).path(STEP))
    for stage, ranks in ((3, 1), (3, 3), (2, 3)):
        convert(origin, tmp_path / f"{stage}-{ranks}", stage=stage, world_size=ranks)
        assert Source(tmp_path / f"{stage}-{ranks}" / name_of(STEP)).digest() == origin.digest(), (stage, ranks)
    universal.write(origin, tmp_path / "universal" / "x")
    convert(universal.open_checkpoint(tmp_path / "universal" / "x"), tmp_path / "back", stage=2, world_size=3)
    assert Source(tmp_path / "back" / name_of(STEP)).digest() == origin.digest()


@pytest.mark.parametrize(
    ("old", "new"), [("bf16+8", "bf16"), ("bf16+16", "bf16"), ("bf16", "bf16+8"), ("bf16", "bf16+4")]
)
def test_weights_take_another_format(tmp_path: Path, old: str, new: str) -> None:
    """Without remainder they are the nearest of bf16, and back from there they are the same."""
    origin = Source(whole(tmp_path, weights=old).path(STEP))
    flats = [replace(flat, weights=new) if flat.component != "norm" else flat for flat in origin.sharding.flats]
    transfer = Transfer(origin, replace(origin.sharding, flats=tuple(flats)))
    assert transfer.conversions() == [f"weights were {old} and are {new}"]
    for index, flat in enumerate(flats):
        made = transfer.tensors(index, 0)
        kept = transfer.target.layout(index)
        assert made.keys() == {"", *(key for key, _ in kept.specs)}
        for place in flat.places if flat.component != "norm" else ():
            weight = made[""][place.offset : place.offset + place.numel]
            assert torch.equal(weight, Remainder(0).split(origin.weights(place.name, 0, place.numel))[0])
        if flat.component != "norm":
            assert not any(made[key].any() for key in kept.keys("remainder"))
