"""Errors that are the user's to mend: one sentence, no traceback, exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from toolkit.printable import printable


class UserError(ValueError):
    """Something the user typed or pointed at is wrong.

    The message is one sentence: what is wrong, where, and what is allowed. Entry points print it as
    ``error: <message>`` and exit with status 2. It may quote what a file says: that is made printable here.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


def nearest(word: str, options: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the option closest to `word`, or an empty string if none is close."""
    by_lower = {option.lower(): option for option in options}
    matches = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[matches[0]]!r}?" if matches else ""


def stopped(sentence: str) -> str:
    """`sentence` with its full stop, unless it ends with a hint's question mark."""
    return sentence if sentence.endswith("?") else f"{sentence}."


def but(problem: str) -> str:
    """The end of a sentence whose beginning says what was given: "must be ..." or what it does wrong."""
    return f"but {'' if problem.startswith('must') else 'it '}{stopped(problem)}"


def some(names: Sequence[str], most: int) -> str:
    """The first `most` of `names`, with commas, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
