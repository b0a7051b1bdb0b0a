"""Every rule goes on where it stopped: at the same ranks and stage, and from 2 ranks to 1 and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import launch
from references import BOUNDED, SETTINGS
from resume_worker import save

from toolkit.checkpoint.store import name_of
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.optim import RULES

WORKER = Path(__file__).with_name("resume_worker.py")
STOP, THERE, BEYOND = 2, 3, 4
"""Steps after which checkpoints are saved: where a training is cut, where ranks change, and one more."""
WAYS = [*((rule, 2) for rule in (*RULES, BOUNDED)), (BOUNDED, 1), (BOUNDED, 3)]
"""Rules and the stage at which two ranks train them."""


class World:
    """The folder of the tests: `<rule>-<stage>/<training>/global_step<n>`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def step(
        self, way: tuple[str, int], to: str, at: list[int], source: tuple[str, int] | None = None, **more: Any
    ) -> dict[str, Any]:
        """One of the worker's."""
        rule, stage = way
        optimizer = {"type": rule.partition(",")[0], "params": {"lr": 1e-2, "compile": False} | SETTINGS.get(rule, {})}
        made = {"optimizer": optimizer, "stage": stage, "at": at, "save": str(self.folder(way) / to)}
        origin = {} if source is None else {"source": str(self.folder(way) / source[0] / name_of(source[1]))}
        return made | origin | more

    def folder(self, way: tuple[str, int]) -> Path:
        return self.root / f"{way[0]}-{way[1]}"

    def digest(self, way: tuple[str, int], training: str, step: int) -> str:
        return open_checkpoint(self.folder(way) / training / name_of(step)).digest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> World:
    """Two ranks train, uninterrupted and with a stop; one rank, this process, takes that over at stage 3; two again."""
    made = World(tmp_path_factory.mktemp("resumed"))
    first, back = [], []
    for way in WAYS:
        first.append(made.step(way, "plain", [STOP, THERE, BEYOND]))
        first.append(made.step(way, "cut", [THERE], ("plain", STOP)))
        back.append(made.step(way, "two", [THERE, BEYOND], ("one", THERE)))
    said = launch(made.root / "first", 2, WORKER, {"steps": first})
    for way in WAYS:
        one = made.step(way, "one", [THERE], ("plain", THERE), stage=3)
        said.append([save(one.pop("save"), **one)])
    said += launch(made.root / "back", 2, WORKER, {"steps": back})
    assert all(sentences == [] for rank in said for sentences in rank), "nothing was decoded and encoded again"
    return made


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_it_goes_on_as_if_it_had_not_stopped(world: World, way: tuple[str, int]) -> None:
    assert world.digest(way, "cut", THERE) == world.digest(way, "plain", THERE) != world.digest(way, "plain", STOP)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_two_ranks_go_on_after_one_had_it(world: World, way: tuple[str, int]) -> None:
    assert world.digest(way, "one", THERE) == world.digest(way, "plain", THERE) == world.digest(way, "two", THERE)
    assert world.digest(way, "two", BEYOND) == world.digest(way, "plain", BEYOND) != world.digest(way, "plain", THERE)
