"""For `--plugin`: leaves the run LEANSTATE_MEMORY_LIMIT bytes of the GPU; on a CPU, of address space beyond today's."""

from __future__ import annotations

import os

import torch

_limit = int(os.environ["LEANSTATE_MEMORY_LIMIT"])
if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(_limit / torch.cuda.get_device_properties(0).total_memory)
else:
    import resource

    import psutil

    _most = psutil.Process().memory_info().vms + _limit
    resource.setrlimit(resource.RLIMIT_AS, (_most, _most))
