"""The terminal: what is written there is text, whatever it comes from."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from toolkit.printable import printable

PATIENCE_SECONDS = 2.0
"""What takes no longer shows no progress."""


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


@contextlib.contextmanager
def progress(words: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr, once it takes more than `PATIENCE_SECONDS`; gives what is called with what is done.

    `total`: None where it is not known.
    """
    began = time.monotonic()
    console = PlainConsole(stderr=True)
    columns = (TextColumn(words, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=total)

    def advance(done: int) -> None:
        if time.monotonic() > began + PATIENCE_SECONDS:
            bar.start()
        bar.advance(task, done)

    try:
        yield advance
    finally:
        bar.stop()


@contextlib.contextmanager
def waiting(words: str, say: Callable[[str], None] | None = None) -> Iterator[Callable[[str], None]]:
    """`words` on a terminal's stderr as long as what is within lasts, once it takes more than `PATIENCE_SECONDS`.

    Gives what is called with other words, such as how far it is.

    `say`: gets them once, in place of a terminal.
    """
    console = PlainConsole(stderr=True)
    status = console.status(_plain(words))
    later = threading.Timer(PATIENCE_SECONDS, status.start if say is None else lambda: say(words))
    later.daemon = True
    if console.is_terminal or say is not None:
        later.start()
    try:
        yield lambda words: status.update(_plain(words))
    finally:
        later.cancel()
        if later.ident is not None:  # it may be starting the words just now
            later.join()
        status.stop()


def _plain(words: str) -> Text:
    """In place of a string that rich would look for markup in."""
    return Text(printable(words))
