"""The methods that `--methods` of a benchmark names: those of `toolkit compare`, and one that is another project's."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.compare.methods import read_methods
from toolkit.compare.plan import Method
from toolkit.errors import UserError


def read_each(names: Sequence[str], other: str, stage: int) -> dict[str, Method]:
    """The methods by name, in the order of `names`; `other`, which is no method of `toolkit compare`, has AdamW's JSON.

    Raises:
        UserError: there is none, one is there twice (each has a folder by its name), or one is not right.
    """
    found: dict[str, Method] = {}
    for name in names:
        own = read_methods(["adamw" if name == other else name], [], stage, [])
        for method in own:
            known = other if name == other else method.name
            if known in found or (known == other and name != other):
                taken = "is there twice" if known in found else "is another project's, and takes no config"
                raise UserError(f"--methods {', '.join(names)}: {known!r} {taken}.")
            found[known] = method
    if not found:
        raise UserError("--methods names no method.")
    return found
