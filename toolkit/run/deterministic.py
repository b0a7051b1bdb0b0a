"""`--deterministic`: a GPU that computes the same bits each time, by what torch, cuBLAS and NCCL offer for it.

A CPU run is deterministic without it, and keeps its numbers with it.
"""

from __future__ import annotations

import os
import re

from toolkit.errors import UserError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""Of cuBLAS's workspaces, those with which it always sums in the same order."""

_NO_IMPLEMENTATION = re.compile(r"(\S+) does not have a deterministic implementation")


def enforce() -> None:
    """Allow only deterministic operations from here on; call it before CUDA starts.

    Attention follows by itself: torch's flash and memory-efficient kernels then run their deterministic backward pass,
    and cuDNN's, which has none, is not chosen.

    Raises:
        UserError: the environment asks cuBLAS for a workspace that rules it out.
    """
    given = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if given not in _WORKSPACES:
        allowed = " or ".join(_WORKSPACES)
        raise UserError(f"--deterministic needs {_WORKSPACE}={allowed}, which the environment sets to {given!r}.")
    # Sums in NVLink switches come in any order.
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")

    import torch
    import torch._inductor.config

    torch.use_deterministic_algorithms(True)
    # Otherwise every torch.empty is written once more. Nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # Reductions are not tuned by timing them: another split is another order of summation.
    torch._inductor.config.deterministic = True


def explained(error: BaseException) -> UserError | None:
    """What to tell the user if `error` is that an operation has no deterministic implementation."""
    found = _NO_IMPLEMENTATION.search(str(error))
    if found is None:
        return None
    import torch

    return UserError(
        f"--deterministic: {found[1]} has no deterministic implementation in torch {torch.__version__}; leave the flag "
        "out, or what calls this operation."
    )
