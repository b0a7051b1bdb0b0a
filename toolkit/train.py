"""Train a language model under DeepSpeed: `deepspeed launch/train.py ...` or `python -m toolkit.train ...`.

The command line, the ranks and the exit statuses are here; the run itself is `toolkit.run.training`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

from toolkit.errors import UserError
from toolkit.records.sizes import counted
from toolkit.run import compiling, deterministic, ranks, stopping
from toolkit.run.folder import pretty
from toolkit.run.meeting import AbsentError
from toolkit.run.memory import end_if_out_of_memory
from toolkit.run.output import outliving, quiet
from toolkit.run.screen import Screen
from toolkit.run.settings import RunSettings, parse
from toolkit.run.stopping import (
    DIVERGED,
    INTERRUPTED,
    OUT_OF_MEMORY,
    SILENT,
    Heartbeat,
    LeftBehind,
    MemoryRanOut,
    StopRequest,
    abandon,
)
from toolkit.run.training import train_on_this_rank


def train(settings: RunSettings) -> dict[str, Any]:
    """Do the whole run on this rank, which the launcher (or nobody: world size 1) has started.

    Returns:
        The summary that summary.json holds; the same on every rank.

    Raises:
        UserError: the settings, the JSON, the data or the model are not fit for a run. Raised by every rank.
        MemoryRanOut: raised by ranks whose memory ran out, and by those that this stopped.
        LeftBehind: another rank has ended.
        KeyboardInterrupt: an error after the user had stopped the run.
    """
    screen = Screen(settings.steps, shown=ranks.rank() == 0)
    screen.say(f"starting {counted(ranks.world_size(), 'rank')}")
    if settings.deterministic:
        deterministic.enforce()
    gc.disable()  # what is imported stays; to look through it for garbage, again and again, is a tenth of the start
    background = None
    try:
        background = compiling.begin(settings)
        with Heartbeat() as heartbeat:
            device = ranks.start()
            gc.freeze()
            gc.enable()
            return train_on_this_rank(settings, device, StopRequest(heartbeat), screen, background)
    finally:
        gc.enable()
        if background is not None:
            background.close()


@outliving("nobody reads the output of this run any more; it continues, and its metrics are in its run folder.")
@stopping.interrupts_remembered()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        The exit status: 0, 2 for the user's errors, 3 where gradients stayed not finite. Ranks that cannot end together
        leave with another one: 12 when memory ran out, 110 when a rank gave no sign of life, 130 when stopped by a
        signal, 1 for any other error.
    """
    try:
        ranks.prepare_environment()
        settings = parse(arguments)
        if settings is None:
            return 0
        with quiet(settings.print_json):
            summary = train(settings)
        if settings.print_json and ranks.rank() == 0:
            print(pretty(summary), end="", flush=True)
        status = DIVERGED if summary["diverged"] else INTERRUPTED if summary["interrupted"] else 0
    except UserError as error:
        ranks.report(error)
        status = 2
    except KeyboardInterrupt:
        abandon(INTERRUPTED)
    except MemoryRanOut:
        abandon(OUT_OF_MEMORY)
    except AbsentError as error:
        if ranks.rank() == 0 or ranks.local_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        abandon(SILENT)
    except LeftBehind as error:
        print(f"note: {error}", file=sys.stderr)
        abandon(error.status)
    except Exception as error:
        end_if_out_of_memory(error)
        if ranks.world_size() == 1:
            raise
        if (words := stopping.lost_peer(error)) is not None:
            print(f"error: {words}", file=sys.stderr)
        else:
            sys.excepthook(*sys.exc_info())
        abandon(1)  # others may be in a collective, and this process would wait for them
    ranks.finish()
    return status


if __name__ == "__main__":
    sys.exit(main())
