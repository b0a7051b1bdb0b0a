"""What became slower since an earlier record of the same benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.bench.record import Record, Row, Spread
from toolkit.errors import UserError
from toolkit.sentences import shown

TOLERANCE = 0.05
"""What two runs of the same code on the same machine may differ by."""


@dataclass(frozen=True)
class Change:
    """One quantity of one row, before and now; `times` is how many times as slow it is."""

    row: Row
    quantity: str
    before: Spread
    now: Spread
    tolerance: float

    @property
    def times(self) -> float:
        if self.quantity.endswith("_per_s"):
            return self.before.median / self.now.median
        return self.now.median / self.before.median

    @property
    def slower(self) -> bool:
        """Beyond the spread of both: the quartiles are apart, and the medians by more than the tolerance."""
        worse, better = (self.before, self.now) if self.quantity.endswith("_per_s") else (self.now, self.before)
        return worse.lower > better.upper and self.times > 1 + self.tolerance


def check(before: Record, now: Record, file: Path, *, anyway: bool) -> None:
    """Before anything is measured; `now` has no rows yet.

    Raises:
        UserError: the two are of different benchmarks, ways to measure, machines or settings (the latter two but for
            `anyway`).
    """
    if before.command != now.command:
        raise UserError(f"{file} is of `toolkit bench {before.command}`, not of `toolkit bench {now.command}`.")
    if before.way != now.way:
        raise UserError(
            f"{file} is of another version, whose `toolkit bench {now.command}` measures something else under the same "
            "names: figures of the two do not compare; measure anew with --json."
        )
    pairs = [
        (name.replace("_", " "), getattr(before.machine, name), getattr(now.machine, name))
        for name in type(now.machine).model_fields
    ]
    keys = sorted({*before.settings, *now.settings})
    pairs += [(key.replace("_", " "), before.settings.get(key), now.settings.get(key)) for key in keys]
    for what, old, new in pairs if not anyway else ():
        if old != new:
            raise UserError(
                f"{file} was measured with {what} {shown(old)}, and now it is {shown(new)}: the two do not compare; "
                "--anyway compares them all the same."
            )


def compare(before: Record, now: Record, file: Path, tolerance: float) -> list[Change]:
    """All that both records have.

    Raises:
        UserError: they have nothing in common.
    """
    old = {row.key: row for row in before.rows}
    found = [
        Change(row, quantity, old[row.key].timed[quantity], spread, tolerance)
        for row in now.rows
        if row.key in old
        for quantity, spread in row.timed.items()
        if quantity in old[row.key].timed
    ]
    if not found:
        raise UserError(f"{file} has none of what was measured now.")
    return found
