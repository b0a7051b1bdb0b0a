"""The README's picture shows the figures of the measured tables."""

from __future__ import annotations

from picture import PICTURE, draw, measured


def test_the_picture_is_of_the_tables() -> None:
    found = measured()
    assert all(0 < held < peak for held, peak in found.values())
    assert PICTURE.read_text() == draw(found), "python tests/benchmarks/picture.py draws it anew"
