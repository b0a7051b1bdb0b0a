"""Whether ranks of this machine reach one another, and how fast: a timed all-reduce.

As a module it is one rank of it; its argument is the file that rank 0 writes.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from toolkit.errors import UserError
from toolkit.run import ranks

BYTES = 64 << 20
LIMIT_SECONDS = 180.0
_TIMES = 7


def all_reduce(count: int) -> tuple[float, str]:
    """Time an all-reduce of BYTES bytes of fp32 on `count` new ranks of this machine.

    Returns:
        Seconds of the median of several, after a first that is not timed; and by what ("nccl", "gloo").

    Raises:
        UserError: it failed, or has not ended within LIMIT_SECONDS.
    """
    with tempfile.TemporaryDirectory(prefix="leanstate-reach-") as folder:
        written = Path(folder) / "found.json"
        command = ranks.launch_command("toolkit.run.reach", [str(written)], count, ranks.free_port())
        started = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            said, _ = started.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.communicate()
            raise UserError(
                f"an all-reduce of {count} ranks of this machine has not ended within {LIMIT_SECONDS:.0f} s: they do "
                "not reach one another; NCCL_DEBUG=INFO, or GLOO_SOCKET_IFNAME on CPUs, tells more."
            ) from None
        if started.returncode or not written.exists():
            last = said.strip().splitlines() or ["no message"]
            raise UserError(f"an all-reduce of {count} ranks of this machine failed: {last[-1]}")
        seconds, backend = json.loads(written.read_text(encoding="utf-8"))
        return float(seconds), str(backend)


def bus_bytes(seconds: float, count: int) -> float:
    """Bytes a second that each rank's link carries in an all-reduce of BYTES, as NCCL's tests count them."""
    return 2 * (count - 1) / count * BYTES / seconds


def main() -> None:
    ranks.prepare_environment()
    device = ranks.start()
    import torch
    from torch import distributed

    tensor, took = torch.ones(BYTES // 4, device=device), []
    for _ in range(1 + _TIMES):
        tensor.fill_(1.0)
        distributed.barrier()
        began = time.perf_counter()
        distributed.all_reduce(tensor)
        total = float(tensor[0])  # waits for a GPU
        took.append(time.perf_counter() - began)
        if total != distributed.get_world_size():
            raise UserError(f"ones of {distributed.get_world_size()} ranks add up to {total}")
    if ranks.rank() == 0:
        found = [statistics.median(took[1:]), distributed.get_backend()]
        Path(sys.argv[-1]).write_text(json.dumps(found), encoding="utf-8")
    ranks.finish()


if __name__ == "__main__":
    main()
