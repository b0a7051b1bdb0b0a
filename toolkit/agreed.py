"""What one rank finds wrong is every rank's error: none may end while the others wait for it in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from toolkit.errors import UserError

T = TypeVar("T")


class AgreedError(UserError):
    """An error that every rank raises at the same point, so that one rank's word is enough."""


def agreed(check: Callable[[], T]) -> T:
    """`check()` on every rank; if any rank finds the user in error, every rank raises the first one's.

    There must be no collective within `check` that a rank which raises would miss.
    """
    result: T | None = None
    problem: str | None = None
    try:
        result = check()
    except UserError as error:
        problem = str(error)
    except OSError as error:  # what the file system refuses while we look is the user's to mend
        problem = f"{error.filename or type(error).__name__}: {error.strerror or error}."
    for found in everyones(problem):
        if found is not None:
            raise AgreedError(found)
    return result  # type: ignore[return-value]


def everyones(value: T) -> list[T]:
    """The `value` of every rank, in their order, on every rank."""
    from torch import distributed

    box = [value] * distributed.get_world_size()
    distributed.all_gather_object(box, value)
    return box
