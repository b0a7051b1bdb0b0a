"""Matrices whose sizes are no multiples of a block: the same blocks at every ZeRO stage and number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import launch
from torch import Tensor

from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.source import Source
from toolkit.checkpoint.store import name_of
from toolkit.state.codecs import BLOCK

WORKER = Path(__file__).with_name("odd_worker.py")
STEPS = 3
WAYS = [(ranks, stage) for ranks in (1, 2, 3) for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the same training as saved by each of `WAYS`, and of one more step from another way's."""
    root = tmp_path_factory.mktemp("odd")
    for ranks in (1, 2, 3):
        steps = [{"save": str(root / f"{ranks}-{stage}"), "stage": stage, "steps": STEPS} for stage in (1, 2, 3)]
        if ranks == 2:
            origin = str(root / "1-1" / name_of(STEPS))
            steps += [{"save": str(root / f"on-{s}"), "stage": s, "steps": 1, "source": origin} for s in (1, 3)]
        results = launch(root / f"ranks-{ranks}", ranks, WORKER, {"steps": steps})
        assert all(said == [] for rank in results for said in rank), "nothing was decoded and encoded again"
    return root


def stored(folder: Path) -> dict[str, Tensor]:
    """Weights and every stored tensor of each parameter, codes and scales as they are."""
    source, found = Source(folder), {}
    for name, (index, place) in source.sharding.by_name.items():
        found[name] = source.elements(name, None, 0, place.numel)
        for key, spec in source.sharding.layout(index).specs:
            if len(place.shape) > 1:
                found[f"{name} {key}"] = source.blocks(name, key, 0, -(-place.numel // BLOCK))
            else:
                assert spec.per_block == BLOCK
                found[f"{name} {key}"] = source.elements(name, key, 0, place.numel)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 20
    for key, value in one.items():
        assert torch.equal(other[key], value), key


@pytest.mark.parametrize(("ranks", "stage"), WAYS)
def test_training_gives_the_same_bits_at_every_stage(root: Path, ranks: int, stage: int) -> None:
    """A third of a gradient is rounded, so that three ranks are compared with each other."""
    origin = "3-1" if ranks == 3 else "1-1"
    same(stored(root / origin / name_of(STEPS)), stored(root / f"{ranks}-{stage}" / name_of(STEPS)))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_resumes_at_another_stage_with_the_same_bits(root: Path, stage: int) -> None:
    same(stored(root / "on-1" / name_of(STEPS + 1)), stored(root / f"on-{stage}" / name_of(STEPS + 1)))


def test_resharding_copies_codes(root: Path) -> None:
    folder = root / "3-2" / name_of(STEPS)
    before = stored(folder)
    for number, (ranks, stage) in enumerate([*WAYS, (3, 2)]):
        convert(Source(folder), root / f"cut-{number}", stage=stage, world_size=ranks)
        folder = root / f"cut-{number}" / name_of(STEPS)
        same(before, stored(folder))
    assert Source(folder).sharding == Source(root / "3-2" / name_of(STEPS)).sharding
