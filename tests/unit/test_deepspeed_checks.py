"""What is relied on inside DeepSpeed is looked for at start-up."""

from __future__ import annotations

import pytest

from toolkit.zero import compatibility, engine


class Changed:
    """A class that has lost a method and a field."""

    def __init__(self) -> None:
        self.kept = 1

    def step(self) -> None:
        pass


def test_the_installed_deepspeed_fits() -> None:
    assert compatibility.incompatibilities() == []


def test_what_is_gone_is_named() -> None:
    assert compatibility._missing(Changed, "step reduce", "kept lost") == ["Changed.reduce", "Changed.lost"]


def test_registering_with_another_deepspeed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_registered", False)
    monkeypatch.setattr(compatibility, "incompatibilities", lambda: ["stage3.step"])
    with pytest.raises(RuntimeError, match=r"does not fit DeepSpeed .*stage3\.step changed; install"):
        engine.register()
