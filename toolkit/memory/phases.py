"""The peak of every phase, from a watermark that is read and reset at their borders."""

from __future__ import annotations

from collections.abc import Mapping

from toolkit.memory.watermarks import Watermark
from toolkit.records import categories as c
from toolkit.records.memory import Phase


class PhasePeaks:
    """Peaks by phase. What `watermark` has seen so far is the phase init."""

    def __init__(self, watermark: Watermark) -> None:
        self.phase: str | None = None
        """The one that has begun; None between steps."""
        self._watermark = watermark
        self._peaks: dict[str, tuple[int | None, int]] = {c.INIT: watermark.read()}

    def begin(self, phase: str | None) -> None:
        self.phase = phase
        self._watermark.begin()

    def end(self) -> None:
        """Note the peak of the phase that has begun."""
        peak, resident = self._watermark.read()
        # Between steps belongs to no phase, but its peak is the run's, too.
        name = self.phase or ""
        old, before = self._peaks.get(name, (None, 0))
        self._peaks[name] = (peak if old is None or peak is None else max(peak, old), max(resident, before))

    @property
    def largest(self) -> int:
        """The peak so far of all phases: bytes allocated on a GPU, resident on a CPU."""
        peaks = [*self._peaks.values(), self._watermark.read()]
        return max((resident if peak is None else peak) for peak, resident in peaks)

    def records(self, traced: Mapping[str, Phase]) -> list[Phase]:
        """A record of each phase, with the categories of the `traced` step where there was one."""
        found = []
        for name in c.PHASES:
            peak, resident = self._peaks.get(name, (None, None))
            if name not in traced:
                if resident is not None:
                    found.append(Phase(name=name, peak=peak, resident_set=resident))
                continue
            by_category, total = traced[name].held, traced[name].peak or 0
            if peak is not None and peak > total:
                # Another step held more than the traced one, or an operation did within itself.
                by_category = by_category | {c.OTHER: by_category.get(c.OTHER, 0) + peak - total}
                total = peak
            found.append(Phase(name=name, peak=total, held=by_category, resident_set=resident))
        return found
