"""The terminal: what is written there is text, whatever it comes from."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from toolkit.printable import printable


class PlainConsole(Console):
    """A console of rich's that takes every string as it is: no markup, no emoji codes, no control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print_line(self, text: str, **options: Any) -> None:
        """Print one line, which nothing but the terminal breaks."""
        self.print(text, soft_wrap=True, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string on its way to the screen passes here, those in tables too."""
        return super().render_str(printable(text, lines=True), **options)
