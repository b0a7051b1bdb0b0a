"""Compiled steps on disk: loaded by the next process, never in place of another step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as settings
from torch import Tensor

from toolkit.optim import inductor, kept
from toolkit.optim.kernel import StepFunction
from toolkit.optim.rule import Rule
from toolkit.optim.rules.lomo import LOMORule
from toolkit.state.codecs import BLOCK
from toolkit.state.layout import Layout


def stepped(rule: type[Rule] = LOMORule) -> tuple[Tensor, StepFunction]:
    """Weights after a compiled step, of a function made anew, as in a new process."""
    made = rule(lr=0.1)
    function = StepFunction(rule, tuple(made.scalars(1)), Layout((), (), None))
    theta, g = torch.ones(8, BLOCK), torch.linspace(-1, 1, 8 * BLOCK).view(8, BLOCK)
    function(True, theta, g, torch.tensor(list(made.scalars(1).values())), torch.ones(()), [], (0, 1, 0))
    assert function.fallback_reason is None
    return theta, function


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "leanstate"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each step that is traced, which one that is loaded is not."""
    found: list[Any] = []
    usual = inductor._without_data
    monkeypatch.setattr(inductor, "_without_data", lambda *args: found.append(args) or usual(*args))
    return found


def test_a_step_is_traced_once_for_all_processes(cache: Path, traced: list[Any]) -> None:
    first, _ = stepped()
    [file] = cache.iterdir()
    again, _ = stepped()
    assert len(traced) == 1 and torch.equal(again, first)
    torch.testing.assert_close(first, 1.0 - 0.1 * torch.linspace(-1, 1, 8 * BLOCK).view(8, BLOCK))
    file.write_bytes(file.read_bytes()[:1000])
    mended, _ = stepped()
    assert len(traced) == 2 and torch.equal(mended, first), "what is damaged is made anew"
    stepped()
    assert len(traced) == 2


def test_what_a_user_wrote_is_traced_by_every_process(cache: Path, traced: list[Any]) -> None:
    class TwiceRule(LOMORule):
        """Its file is not among the sources that the key has."""

        @staticmethod
        def update(theta: Any, g: Any, **s: Any) -> Any:
            return LOMORule.update(theta, 2.0 * g, **s)

    slow, _ = stepped()
    fast, _ = stepped(TwiceRule)
    torch.testing.assert_close(fast - 1.0, 2.0 * (slow - 1.0))
    stepped(TwiceRule)
    assert len(traced) == 3 and len(list(cache.iterdir())) == 1


def test_a_key_has_all_that_the_code_follows_from(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4, BLOCK)
    threads = torch.get_num_threads()
    try:
        places = [kept.place("a", [x, None]), kept.place("b", [x, None]), kept.place("a", [x, x])]
        places += [kept.place("a", [x.bfloat16(), None]), kept.place("a", [x[:, :128], None])]
        torch.set_num_threads(threads + 1)
        places.append(kept.place("a", [x, None]))
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(kept, "SOURCES", "other sources")
    places.append(kept.place("a", [x, None]))
    monkeypatch.undo()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache.parent))
    assert None not in places and len(set(places)) == len(places)
    assert kept.place("a", [torch.zeros(9, BLOCK), None]) == places[0], "one for every number of blocks"


def test_nothing_is_kept_where_caches_are_off_and_of_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept.place("a", [torch.zeros(4, BLOCK, device="meta")]) is None
    with settings.patch(force_disable_caches=True):
        assert kept.place("a", [torch.zeros(4, BLOCK)]) is None
    # A machine whose GPU compiles the step may have no C++ compiler.
    asked: list[None] = []
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: asked.append(None) or "g++")
    assert kept.place("a", [torch.zeros(4, BLOCK, device="meta")]) is None and not asked
    assert kept.place("a", [torch.zeros(4, BLOCK)]) is not None and asked
