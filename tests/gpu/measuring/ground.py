"""What the machine is: bandwidth, matrix products, and what lies outside torch's allocator."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable

import torch

from measuring.record import Recorder
from toolkit.bench.timing import in_turn

ROUNDS = 5


def measure(recorder: Recorder) -> None:
    cuda = recorder.device == "cuda"
    if cuda:
        before = used_by_others()  # before this process has a context
        recorder.note(f"{before / 1e9:.2f} GB of the GPU were in use before.")
    # 4 GB: far more than any cache.
    recorder.set(copy_tb_s=copy_bandwidth(2**13 if recorder.rehearse else 2**32, recorder.device) / 1e12)
    n = 64 if recorder.rehearse else 8192
    a, b = (torch.randn(n, n, device=recorder.device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    seconds = timed(lambda: torch.mm(a, b, out=c), recorder.device)
    recorder.set(matmul_tflop_s=2 * n**3 / seconds / 1e12)
    if not cuda:
        return
    held = torch.cuda.memory_allocated() - a.nbytes - b.nbytes - c.nbytes
    torch._C._cuda_clearCublasWorkspaces()
    now = torch.cuda.memory_allocated() - a.nbytes - b.nbytes - c.nbytes
    recorder.set(workspace_mb=(held - now) / 1e6, context_gb=(outside() - before) / 1e9)
    with_nccl(recorder)


def copy_bandwidth(size: int, device: str) -> float:
    """Bytes a second, read and written, of copies of `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), device)


def used_by_others() -> int:
    """Bytes of the GPU in use, as nvidia-smi says, which needs no context; 0 where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(said.split()[0]) << 20


def outside() -> int:
    """Bytes of the GPU in use that this process's allocator does not have, other processes' among them."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def with_nccl(recorder: Recorder) -> None:
    """What NCCL takes at its first collective: on one rank, so without the buffers of its peers."""
    from torch import distributed

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    before = outside()
    distributed.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    distributed.all_reduce(torch.ones(1 << 20, device="cuda"))
    torch.cuda.synchronize()
    recorder.set(nccl_gb=(outside() - before) / 1e9)
    distributed.destroy_process_group()


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call on the device: the median of `ROUNDS`."""
    return statistics.median(one.done for one in in_turn({"": call}, device, ROUNDS)[""])
