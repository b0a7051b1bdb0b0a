"""`--compile-model` on two ranks: the losses of the run without it, and a resume that continues to the last bit."""

from __future__ import annotations

import pytest
from test_checkpoints import EXACT, WAYS, World, model, steps_of

RELEASED = ["--set", "optimizer.params.release_gradients=true", "--activations", "checkpoint"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("compiled"))
    model(world.root / "plain", 64, attention_dropout=0.0, num_hidden_layers=2)
    way = [*WAYS["amcs-2"], *RELEASED]
    runs = {
        name: world.arguments(f"runs/{name}", way, 2, *more, model="plain")
        for name, more in {"usual": [], "compiled": ["--compile-model"], "stopped": ["--compile-model"]}.items()
    }
    steps = [{"run": runs["usual"]}, {"run": runs["compiled"]}, {"run": runs["stopped"], "stop_at": 3}]
    steps_of(world, "ranks", 2, [*steps, {"run": runs["stopped"]}])
    return world


def test_losses_are_those_without_it(world: World) -> None:
    usual, compiled = (world.records(f"runs/{name}") for name in ("usual", "compiled"))
    assert len(usual) == len(compiled) == 10
    for own, other in zip(compiled, usual, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=2e-3), own["step"]
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2), own["step"]
    assert [own["loss"] for own in compiled] != [other["loss"] for other in usual], "or nothing was compiled"
    assert compiled[0]["compile_s"] > 0 and not any("compile_s" in record for record in compiled[1:])


def test_a_resumed_run_has_the_same_bits(world: World) -> None:
    whole, stopped = (world.records(f"runs/{name}") for name in ("compiled", "stopped"))
    assert [{key: one.get(key) for key in EXACT} for one in stopped] == [
        {key: one.get(key) for key in EXACT} for one in whole
    ]
    assert world.digest("runs/stopped") == world.digest("runs/compiled")
