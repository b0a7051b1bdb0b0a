"""Text from outside (files, names, configurations) on its way to a terminal or a document."""

from __future__ import annotations

import logging
import os
import sys
import unicodedata
from typing import Any

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of what steers a terminal or a text instead of being shown: control characters (ANSI escapes
begin with one), marks of direction and of width zero, halves of characters, separators of lines and paragraphs."""


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with everything that is not shown, but acts, spelt out: a line break becomes the two characters ``\\n``.

    Args:
        lines: line breaks and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        char if char in kept or unicodedata.category(char) not in _HIDDEN else char.encode("unicode_escape").decode()
        for char in text
    )


def echo(text: str, *, err: bool = False) -> None:
    """One line on stdout, or on stderr."""
    print(printable(text), file=sys.stderr if err else None)


def printable_tree(value: Any) -> Any:
    """Plain data of a JSON file with every string in it made printable, keys included; line breaks stay in values."""
    if isinstance(value, str):
        return printable(value, lines=True)
    if isinstance(value, list):
        return [printable_tree(item) for item in value]
    if isinstance(value, dict):
        return {printable(key): printable_tree(item) for key, item in value.items()}
    return value


def warn_once(logger: logging.Logger, message: str, *args: Any) -> None:
    """Log a warning that every rank has to give alike: rank 0 does."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message, *args, stacklevel=2)
