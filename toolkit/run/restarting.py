"""Starting a run again after an end that nobody asked for: `toolkit train --restarts`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from toolkit.errors import UserError
from toolkit.records.run import CHECKPOINTS
from toolkit.run.settings import NONE, RunSettings, line_of
from toolkit.run.stopping import DIVERGED, INTERRUPTED, OUT_OF_MEMORY

FINAL = (0, 2, DIVERGED, OUT_OF_MEMORY, INTERRUPTED)
"""Statuses after which the same line would end in the same way, or should not run on."""
IN_VAIN = 2
"""Ends in a row without a new checkpoint, after which a run is not started again."""


@dataclass
class Restarts:
    """A run with these `settings` is started again `at_most` so often.

    Raises:
        UserError: it has no folder in which it would be found again, or saves nothing.
    """

    settings: RunSettings
    at_most: int

    def __post_init__(self) -> None:
        if self.at_most and self.settings.run_dir is None:
            raise UserError("--restarts continues what is in the run's folder; name it with --run-dir.")
        if self.at_most and self.settings.save_every == 0:
            raise UserError("--restarts continues from checkpoints, and --save-every is 0; give one of them up.")

    def until_the_end(self, start: Callable[[list[str]], tuple[int, bool]]) -> int:
        """Call `start` with the run's options, once or until nothing is left to do; returns its last status.

        `start` returns the status of the run and whether somebody has asked it to stop.
        """
        newest, in_vain, made = self._newest() if self.at_most else 0, 0, 0
        while True:
            status, asked = start(self._line(newest if made else None))
            if asked or status in FINAL or not self.at_most:
                return status
            before, newest = newest, self._newest()
            in_vain = 0 if newest > before else in_vain + 1
            ended = f"the run has ended with status {status}"
            if in_vain == IN_VAIN:
                self._say(f"{ended} and is not started again: {IN_VAIN} times in a row it has saved no checkpoint.")
                return status
            if made == self.at_most:
                self._say(f"{ended} and is not started again: --restarts allows {made}.")
                return status
            made += 1
            where = f"its checkpoint of step {newest}" if newest else "the beginning"
            self._say(f"{ended} and starts again from {where} (restart {made} of at most {self.at_most}).")

    def _newest(self) -> int:
        from toolkit.checkpoint.store import Store

        folder = self.settings.run_dir
        return max(Store(folder / CHECKPOINTS).steps(), default=0) if folder is not None else 0

    def _line(self, resumed: int | None) -> list[str]:
        """The options of the run; after a restart it continues from what it has saved itself."""
        given = self.settings.model_fields_set
        if resumed or (resumed is not None and self.settings.resume == NONE):
            given = given - {"resume"}
        return line_of(self.settings.model_dump(include=given))

    @staticmethod
    def _say(words: str) -> None:
        print(f"note: {words}", file=sys.stderr, flush=True)
