"""The README's pictures show what was measured."""

from __future__ import annotations

import json

from picture import CURVES, LOSSES, NAMES, PICTURE, draw, draw_losses, measured


def test_the_picture_is_of_the_tables() -> None:
    found = measured()
    assert all(0 < held < peak for held, peak in found.values())
    assert PICTURE.read_text() == draw(found), "python tests/benchmarks/picture.py draws it anew"


def test_the_curves_are_of_the_runs() -> None:
    found = json.loads(LOSSES.read_text())
    assert len(found["runs"]) > 1 and found["runs"].keys() <= NAMES.keys()
    assert CURVES.read_text() == draw_losses(found), "python tests/benchmarks/picture.py draws it anew"
