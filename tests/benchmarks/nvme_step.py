"""The step of one tensor whose state lies in memory, or in a file.

    python tests/benchmarks/nvme_step.py --parameters 134e6
    python tests/benchmarks/nvme_step.py --parameters 134e6 --folder /mnt/nvme

AMCS, state in 8 bits, bf16 weights with 8 bits of remainder, in a plain loop: the folder is what `nvme_path` is to an
engine. What a step takes depends on how much of the file the operating system can keep. A limit on that is set from
outside, on the whole process, its file pages included; weights, gradients and Python need 4 bytes a parameter and
0.5 GB of it:

    systemd-run --user --scope -p MemoryMax=7500M -p MemorySwapMax=0 \
        python tests/benchmarks/nvme_step.py --parameters 1000e6 --folder /mnt/nvme

or, as root, where there is no systemd (version 2 of control groups; of version 1 the file is memory.limit_in_bytes,
below /sys/fs/cgroup/memory):

    mkdir /sys/fs/cgroup/small && echo 7500M > /sys/fs/cgroup/small/memory.max
    (echo $BASHPID > /sys/fs/cgroup/small/cgroup.procs; exec python tests/benchmarks/nvme_step.py ...)

Seconds are of each step after the first one, which compiles and makes the state. "Resident" is the largest resident set
of these steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from toolkit.memory.watermarks import ResidentSet
from toolkit.optim import AMCS
from toolkit.state.files import StateFiles

COLUMNS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=134e6)
    parser.add_argument("--folder", type=Path, help="where the state's file is made; default: in memory")
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = (max(1, round(options.parameters / COLUMNS)), COLUMNS)
    weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02))
    weight.grad = torch.empty_like(weight).normal_(std=1e-3)
    groups = [{"params": [weight], "component": "ffn"}]
    optimizer = AMCS(groups, lr=1e-3, total_steps=1000, state_format="8bit", weights="bf16+8")
    if options.folder is not None:
        optimizer.files = StateFiles(options.folder)
    optimizer.step()
    watermark = ResidentSet()
    watermark.begin()
    seconds = []
    for _ in range(options.steps):
        began = perf_counter()
        optimizer.step()
        seconds.append(perf_counter() - began)
    place = "in memory" if options.folder is None else f"in a file in {options.folder}"
    state = sum(optimizer.state_bytes().values())
    print(f"{weight.numel() / 1e6:,.0f}M parameters, {state / 1e9:.2f} GB of state {place}, {options.threads} threads")
    print(f"resident: {watermark.read()[1] / 1e9:.2f} GB at most")
    print("s a step: " + ", ".join(f"{one:.2f}" for one in seconds))


if __name__ == "__main__":
    main()
